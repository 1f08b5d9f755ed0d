"""An OpenID Connect issuer on loopback over real HTTP: discovery, keys, device authorization, tokens."""

import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

AUDIENCE = "fedmesh"


class Issuer:
    """Signs what it is asked to. answers: what the token endpoint says next, oldest first. asked: paths, in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = rsa.generate_private_key(65537, 2048)
        self.kid = "k1"
        self.down = False
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.answers: list[dict[str, Any]] = []

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims of a good token; a change to None leaves the claim out."""
        now = int(time.time())
        good = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "ann",
            "iat": now,
            "exp": now + 600,
            "auth_time": now,
            "roles": ["admins"],
            "amr": ["pwd", "otp"],
        }
        return {name: value for name, value in {**good, **changes}.items() if value is not None}

    def token(self, **changes: Any) -> str:
        return jwt.encode(self.claims(**changes), self.key, "RS256", {"kid": self.kid})

    def document(self, path: str, form: dict[str, str]) -> dict[str, Any] | None:
        if path == "/.well-known/openid-configuration":
            ends = {name: f"{self.url}/{name}" for name in ("token_endpoint", "device_authorization_endpoint")}
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys", **ends}
        if path == "/keys":
            public = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
            return {"keys": [{**public, "kid": self.kid, "use": "sig"}]}
        if path == "/device_authorization_endpoint":
            return {
                "device_code": "d-1",
                "user_code": "ABCD-EFGH",
                "verification_uri": f"{self.url}/device",
                "expires_in": 600,
                "interval": 1,
            }
        self.forms.append(form)
        return self.answers.pop(0) if path == "/token_endpoint" else None


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    """An issuer that answers for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            form = dict(urllib.parse.parse_qsl(self.rfile.read(size).decode()))
            issuer.asked.append(self.path)
            found = None if issuer.down else issuer.document(self.path, form)
            body = json.dumps(found or {}).encode()
            self.send_response(503 if found is None else 400 if "error" in found else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        issuer = Issuer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield issuer
        finally:
            server.shutdown()
            thread.join()
