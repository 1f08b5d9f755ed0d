"""An OpenID Connect issuer for one machine, so that signing in can be tried: for development, and for nothing else.

Nobody proves anything to it: whoever reaches its page on this machine signs in as whom they choose. What keeps others
out is that an operator's certificate is needed beside a token, which lies in the stack's folder. So it listens on
loopback only, for a stack's folder of this user only, and servers take its tokens only where their configuration says
`allow_loopback_issuer`.

    python -m services.embedded.issuer --dir STACK --listen 127.0.0.1:PORT
"""

import argparse
import ipaddress
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import Field

from services.common.config import RoleName, Section, load_config, require_private
from services.common.errors import Code, FedmeshError
from services.common.ids import require_name
from services.embedded.accounts import private_folder
from services.embedded.ca import CA_CERTIFICATE
from services.embedded.issuer_http import Answer, html, serve
from services.embedded.processes import write_private

AUDIENCE: Final = "fedmesh"
CLIENT_ID: Final = "fedmesh-cli"
FOLDER: Final = "issuer"
USERS: Final = "users.yaml"
_KEY: Final = "key.pem"

_TOKEN_S: Final = 600
_CODE_S: Final = 600
_SIGN_IN_S: Final = 12 * 3600
_POLL_S: Final = 1
# Codes and sign-ins that are remembered; the oldest goes first.
_MOST: Final = 200
# No vowels, and nothing that looks like something else.
_LETTERS: Final = "BCDFGHJKLMNPQRSTVWXZ"
_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"

_FIRST_USERS: Final = """\
# Who may sign in at this machine's issuer, with which roles. second_factor: whether the tokens say that there was one.
users:
  alice: {roles: [consortium-admin, sre], second_factor: true}
  bob: {roles: [consortium-admin], second_factor: true}
  rita: {roles: [researcher], second_factor: true}
  arthur: {roles: [auditor], second_factor: false}
  sam: {roles: [sre], second_factor: true}
"""


class User(Section):
    roles: frozenset[RoleName] = Field(default=frozenset(), description="fedmesh's roles")
    second_factor: bool = Field(default=True, description="whether tokens say that a second factor was used")


class Users(Section):
    users: dict[str, User] = Field(min_length=1, description="by name, which is the subject of the tokens")


@dataclass
class _Device:
    """A terminal that waits. user: who signed in for it; refused: that somebody said no."""

    user_code: str
    ends_at: float
    user: str = ""
    refused: bool = False


class Issuer:
    """Answers requests. url: where it listens, which is its name. key: signs tokens."""

    def __init__(self, url: str, users: Mapping[str, User], key: rsa.RSAPrivateKey) -> None:
        self.url = url
        self.users = users
        self.key = key
        self.kid = "k1"
        self._devices: dict[str, _Device] = {}
        # Refresh tokens: who, and when they signed in (Unix time in seconds).
        self._sign_ins: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def claims(self, user: str, signed_in: int) -> dict[str, Any]:
        """What a token of this issuer says."""
        now = int(time.time())
        known = self.users[user]
        return {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": user,
            "iat": now,
            "exp": now + _TOKEN_S,
            "auth_time": signed_in,
            "roles": sorted(known.roles),
            "amr": ["pwd", "otp"] if known.second_factor else ["pwd"],
        }

    def sign(self, claims: Mapping[str, Any]) -> str:
        return jwt.encode(dict(claims), self.key, "RS256", {"kid": self.kid})

    def answer(self, method: str, path: str, form: Mapping[str, str]) -> Answer:
        """Answer a request. form: of a POST's body, or the query."""
        with self._lock:
            if (method, path) == ("GET", "/.well-known/openid-configuration"):
                return Answer.json(self._discovery())
            if (method, path) == ("GET", "/keys"):
                return Answer.json({"keys": [self._public_key()]})
            if (method, path) == ("POST", "/device_authorization"):
                return self._invite(form)
            if (method, path) == ("POST", "/token"):
                return self._token(form)
            if path == "/device":
                return self._confirm(form) if method == "POST" else self._page(form.get("user_code", ""))
        return Answer(404, html("There is nothing here."))

    def _discovery(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/keys",
            "token_endpoint": f"{self.url}/token",
            "device_authorization_endpoint": f"{self.url}/device_authorization",
        }

    def _public_key(self) -> dict[str, Any]:
        public: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {**public, "kid": self.kid, "use": "sig", "alg": "RS256"}

    def _invite(self, form: Mapping[str, str]) -> Answer:
        if form.get("client_id") != CLIENT_ID:
            return Answer.json({"error": "invalid_client"}, 400)
        letters = "".join(secrets.choice(_LETTERS) for _ in range(8))
        device = _Device(f"{letters[:4]}-{letters[4:]}", time.time() + _CODE_S)
        code = secrets.token_urlsafe(32)
        _remember(self._devices, code, device)
        return Answer.json(
            {
                "device_code": code,
                "user_code": device.user_code,
                "verification_uri": f"{self.url}/device",
                "verification_uri_complete": f"{self.url}/device?user_code={device.user_code}",
                "expires_in": _CODE_S,
                "interval": _POLL_S,
            }
        )

    def _token(self, form: Mapping[str, str]) -> Answer:
        if form.get("client_id") != CLIENT_ID:
            return Answer.json({"error": "invalid_client"}, 400)
        if form.get("grant_type") == "refresh_token":
            return self._refreshed(form.get("refresh_token", ""))
        if form.get("grant_type") != _GRANT:
            return Answer.json({"error": "unsupported_grant_type"}, 400)
        code = form.get("device_code", "")
        device = self._devices.get(code)
        if device is None or time.time() >= device.ends_at:
            return Answer.json({"error": "expired_token"}, 400)
        if not device.user and not device.refused:
            return Answer.json({"error": "authorization_pending"}, 400)
        del self._devices[code]
        if device.refused:
            return Answer.json({"error": "access_denied"}, 400)
        refresh = secrets.token_urlsafe(32)
        _remember(self._sign_ins, refresh, (device.user, int(time.time())))
        return self._refreshed(refresh)

    def _refreshed(self, refresh: str) -> Answer:
        user, signed_in = self._sign_ins.get(refresh, ("", 0))
        if user not in self.users or time.time() >= signed_in + _SIGN_IN_S:
            return Answer.json({"error": "invalid_grant"}, 400)
        token = self.sign(self.claims(user, signed_in))
        answer = {"access_token": token, "id_token": token, "refresh_token": refresh}
        return Answer.json({**answer, "token_type": "Bearer", "expires_in": _TOKEN_S})

    def _page(self, user_code: str) -> Answer:
        known = user_code if any(device.user_code == user_code for device in self._devices.values()) else ""
        choices = "".join(f'<button name="user" value="{name}">{name}</button> ' for name in self.users)
        return Answer(
            200,
            html(
                "Who signs in? Nobody has to prove it: this issuer is for development.",
                f'<form method="post"><p><label>Code <input name="user_code" value="{known}"></label></p>'
                f'<p>{choices}</p><p><button name="refuse" value="yes">Refuse</button></p></form>',
            ),
        )

    def _confirm(self, form: Mapping[str, str]) -> Answer:
        wanted = form.get("user_code", "").strip().upper()
        user = form.get("user", "")
        device = next((one for one in self._devices.values() if one.user_code == wanted), None)
        if device is None or time.time() >= device.ends_at:
            return Answer(400, html("No terminal waits with this code: run fedmesh login."))
        if form.get("refuse"):
            device.refused = True
            return Answer(200, html("Refused."))
        if user not in self.users:
            return Answer(400, html(f"Name one of these as user: {', '.join(self.users)}."))
        device.user = user
        return Answer(200, html(f"Signed in as {user}. The terminal goes on by itself."))


def _remember(known: dict[str, Any], key: str, value: Any) -> None:
    known[key] = value
    if len(known) > _MOST:
        del known[next(iter(known))]


def prepare(stack: Path) -> Path:
    """Make an issuer's folder in that of a stack, once; who has one signs in from then on. The file of its users."""
    folder = private_folder(stack / FOLDER)
    if not (folder / _KEY).exists():
        pem = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(folder / _KEY, pem.decode())
    if not (folder / USERS).exists():
        write_private(folder / USERS, _FIRST_USERS)
    return folder / USERS


def load(stack: Path, listen: str) -> Issuer:
    """The issuer of a stack.

    Raises: FedmeshError(CONFIG_INVALID) for an address that is not loopback, a folder that is no stack of this user, or
        unusable files in it.
    """
    require_loopback(listen)
    if not (stack / "ca" / CA_CERTIFICATE).is_file() or not (stack / "config").is_dir():
        raise FedmeshError(Code.CONFIG_INVALID, f"{stack} is no stack of `fedmesh up`: this issuer is for one only")
    for path in (stack, stack / FOLDER):
        if not path.is_dir() or path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o077:
            raise FedmeshError(Code.CONFIG_INVALID, f"{path} must be a folder of yours, closed to others: chmod 700 it")
    folder = stack / FOLDER
    require_private(folder / _KEY)
    users = load_config(Users, folder / USERS).users
    for name in users:
        require_name(name, f"{folder / USERS}: a user's name")
    key = serialization.load_pem_private_key((folder / _KEY).read_bytes(), password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise FedmeshError(Code.CONFIG_INVALID, f"{folder / _KEY} is no RSA key")
    return Issuer(f"http://{listen}", users, key)


def require_loopback(listen: str) -> None:
    """Raises: FedmeshError(CONFIG_INVALID) for an address that others than this machine could reach."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise FedmeshError(
        Code.CONFIG_INVALID, f"{listen}: this issuer asks nobody for a proof, so it listens on a loopback address only"
    )


def people_section(url: str) -> dict[str, Any]:
    """`server.people` of the services that take this issuer's tokens."""
    roles = ("researcher", "hospital-admin", "consortium-admin", "auditor", "sre")
    return {"issuer": url, "audience": AUDIENCE, "allow_loopback_issuer": True, "roles": {name: name for name in roles}}


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.embedded.issuer", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="the stack's folder")
    parser.add_argument("--listen", required=True, help="loopback address and port")
    options = parser.parse_args(arguments)
    try:
        server = serve(load(options.dir.absolute(), options.listen), options.listen)
    except FedmeshError as error:
        print(f"issuer: {error}", file=sys.stderr)
        return 78
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    with server:
        server.serve_forever(poll_interval=0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
