"""Signing in from a terminal: OAuth 2.0 device authorization (RFC 8628) with any OpenID Connect issuer."""

import json
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError

from services.common.config import is_safe_url
from services.common.errors import Code, FedmeshError
from services.common.people.web import Web

_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
_POLL_S: Final = 5.0


@dataclass(frozen=True)
class Client:
    """What the issuer knows this command as. token: which of its tokens the mesh reads, `access` or `id`."""

    issuer: str
    client_id: str
    scope: str
    token: str
    ca: Path | None = None


@dataclass(frozen=True)
class Tokens:
    """What a person holds after signing in. ends_at: Unix time in seconds."""

    bearer: str
    ends_at: float
    refresh: str | None


@dataclass(frozen=True)
class Invitation:
    """Where a person goes, and what they type there. interval_s: between two questions; ends_at: Unix time (s)."""

    url: str
    code: str
    device_code: str
    interval_s: float
    ends_at: float


class Device:
    """One issuer, asked by this terminal. sleep: waits so many seconds."""

    def __init__(self, client: Client, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) for an issuer without HTTPS, (SERVICE_UNAVAILABLE) when it is away."""
        if not is_safe_url(client.issuer):
            raise FedmeshError(Code.CONFIG_INVALID, f"--issuer {client.issuer}: use an https:// URL")
        self._client = client
        self._sleep = sleep
        self._web = Web(client.ca)
        found = self._ask(client.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if found.get("issuer") != client.issuer:
            raise FedmeshError(
                Code.CONFIG_INVALID, f"{client.issuer} says that it is {found.get('issuer')}: use that name"
            )
        self._endpoints = found

    def invite(self) -> Invitation:
        """Begin to sign in.

        Raises: FedmeshError(PERMISSION_DENIED) when the issuer refuses, (SERVICE_UNAVAILABLE) when it is away.
        """
        answer = self._ask(
            self._endpoint("device_authorization_endpoint"),
            {"client_id": self._client.client_id, "scope": self._client.scope},
        )
        if "error" in answer:
            raise _refused(answer)
        try:
            return Invitation(
                str(answer["verification_uri"]),
                str(answer["user_code"]),
                str(answer["device_code"]),
                float(answer.get("interval", _POLL_S)),
                time.time() + float(answer["expires_in"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the issuer's answer is no device authorization") from error

    def wait(self, invitation: Invitation) -> Tokens:
        """Ask until the person has decided, more slowly whenever the issuer says so.

        Raises: FedmeshError(PERMISSION_DENIED) when the person or the issuer refuses, (DEADLINE_EXCEEDED) when the code
            has expired.
        """
        interval = invitation.interval_s
        form = {"grant_type": _GRANT, "device_code": invitation.device_code, "client_id": self._client.client_id}
        while time.time() < invitation.ends_at:
            self._sleep(interval)
            answer = self._ask(self._endpoint("token_endpoint"), form)
            error = answer.get("error")
            if error is None:
                return self._tokens(answer, None)
            if error == "slow_down":
                interval += _POLL_S
            elif error == "expired_token":
                break
            elif error != "authorization_pending":
                raise _refused(answer)
        raise FedmeshError(Code.DEADLINE_EXCEEDED, "the code has expired: run `fedmesh login` again")

    def refresh(self, refresh: str) -> Tokens:
        """New tokens for a refresh token.

        Raises: FedmeshError(UNAUTHENTICATED) when the issuer wants the person to sign in again.
        """
        form = {"grant_type": "refresh_token", "refresh_token": refresh, "client_id": self._client.client_id}
        answer = self._ask(self._endpoint("token_endpoint"), form)
        if "error" in answer:
            raise FedmeshError(Code.UNAUTHENTICATED, "the sign-in is over: run `fedmesh login`")
        return self._tokens(answer, refresh)

    def _tokens(self, answer: dict[str, Any], refresh: str | None) -> Tokens:
        bearer = answer.get(f"{self._client.token}_token")
        if not isinstance(bearer, str) or not bearer.isascii():
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"the issuer sent no {self._client.token} token")
        try:
            ends_at = time.time() + float(answer.get("expires_in", 300))
        except (TypeError, ValueError) as error:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the issuer's tokens end at no readable time") from error
        return Tokens(bearer, ends_at, answer.get("refresh_token", refresh))

    def _endpoint(self, name: str) -> str:
        url = self._endpoints.get(name)
        if not isinstance(url, str) or not is_safe_url(url):
            raise FedmeshError(Code.CONFIG_INVALID, f"{self._client.issuer} offers no {name} over HTTPS")
        return url

    def _ask(self, url: str, form: dict[str, str] | None = None) -> dict[str, Any]:
        """The JSON object that answers, an OAuth error included.

        Raises: FedmeshError(SERVICE_UNAVAILABLE) when none does.
        """
        body = urllib.parse.urlencode(form).encode() if form is not None else None
        try:
            try:
                answer = self._web.read(url, body)
            except HTTPError as error:
                with error:
                    answer = json.loads(error.read(1 << 16))
        except (OSError, ValueError) as error:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"{url} does not answer as an issuer does: {error}") from error
        if not isinstance(answer, dict):
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"{url} does not answer as an issuer does")
        return answer


def _refused(answer: dict[str, Any]) -> FedmeshError:
    told = answer.get("error_description") or answer["error"]
    return FedmeshError(Code.PERMISSION_DENIED, f"the issuer refused to sign you in: {told}")
