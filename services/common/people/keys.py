"""An issuer's public keys: fetched over HTTPS, kept for a while, and for a bounded while longer when it is away."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from services.common.config import PeopleConfig
from services.common.errors import Code, FedmeshError
from services.common.people.web import Web
from services.common.telemetry import get_logger

log = get_logger(__name__)

# Least time between two fetches, whatever key ids callers name and however the fetch ended.
FETCH_GAP_S: Final = 5.0

Keys = dict[str, dict[str, Any]]


class IssuerKeys:
    """The JSON Web Keys of one issuer by key id. clock: monotonic seconds."""

    def __init__(self, config: PeopleConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when the CA file cannot be read."""
        self._config = config
        self._clock = clock
        self._url = config.jwks_url
        self._web = Web(config.ca)
        self._keys: Keys = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._lock = asyncio.Lock()

    async def get(self, kid: str) -> dict[str, Any]:
        """The key of an id.

        Raises: FedmeshError(UNAUTHENTICATED) when the issuer has no such key, (SERVICE_UNAVAILABLE) when the issuer
            cannot be reached and what is known of its keys is too old.
        """
        limit = self._config.keys_fresh_s + self._config.keys_stale_s
        # While somebody else asks an issuer that may be away, what is known is good enough.
        waits = not (self._lock.locked() and kid in self._keys and self._age() <= limit)
        if waits and (kid not in self._keys or self._age() > self._config.keys_fresh_s):
            async with self._lock:
                if (kid not in self._keys or self._age() > self._config.keys_fresh_s) and self._may_try():
                    await self._refresh()
        if self._age() > limit:
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE, "the issuer's keys cannot be fetched, so nobody can be signed in: try again"
            )
        if kid not in self._keys:
            raise FedmeshError(Code.UNAUTHENTICATED, "the token names a key that the issuer does not have")
        return self._keys[kid]

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    def _may_try(self) -> bool:
        return self._tried_at is None or self._clock() - self._tried_at >= FETCH_GAP_S

    async def _refresh(self) -> None:
        self._tried_at = self._clock()
        try:
            self._keys = await asyncio.to_thread(self._fetch)
        # What an issuer may answer is open-ended; no answer of its may be more than a key that is missing.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("issuer_keys_not_fetched", issuer=self._config.issuer, reason=str(error))
            return
        self._fetched_at = self._clock()

    def _fetch(self) -> Keys:
        if self._url is None:
            found = self._web.read(self._config.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if found["issuer"] != self._config.issuer:
                raise ValueError("the discovery document is another issuer's")
            if not self._config.trusts(found["jwks_uri"]):
                raise ValueError("the discovery document's jwks_uri is not HTTPS, or leads to this machine")
            self._url = str(found["jwks_uri"])
        return {
            key["kid"]: key
            for key in self._web.read(self._url)["keys"]
            if isinstance(key.get("kid"), str) and key.get("use", "sig") == "sig"
        }
