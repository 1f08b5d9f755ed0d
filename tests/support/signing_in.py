"""The issuer of `fedmesh up --sign-in` in this process, over real HTTP; it also signs and says what a test asks for."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from services.embedded.issuer import AUDIENCE, Issuer, User
from services.embedded.issuer_http import Answer, serve
from services.embedded.processes import free_port

__all__ = ["AUDIENCE", "TestIssuer", "running_issuer"]

USERS = {
    "ann": User(roles=frozenset({"consortium-admin"})),
    "rita": User(roles=frozenset({"auditor"}), second_factor=False),
}


@cache
def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


class TestIssuer(Issuer):
    """answers: what the token endpoint says next, oldest first, in place of its own. asked: paths, in order."""

    __test__ = False

    def __init__(self, url: str) -> None:
        super().__init__(url, USERS, _key())
        self.down = False
        self.asked: list[str] = []
        self.forms: list[Mapping[str, str]] = []
        self.answers: list[dict[str, Any]] = []

    def good(self, **changes: Any) -> dict[str, Any]:
        """Claims of a good token of ann's, in the words of some other issuer; a change to None leaves the claim out."""
        good = {**self.claims("ann", int(time.time())), "roles": ["admins"], **changes}
        return {name: value for name, value in good.items() if value is not None}

    def token(self, **changes: Any) -> str:
        return self.sign(self.good(**changes))

    def answer(self, method: str, path: str, form: Mapping[str, str]) -> Answer:
        self.asked.append(path)
        if self.down:
            return Answer.json({}, 503)
        if path == "/token":
            self.forms.append(form)
            if self.answers:
                said = self.answers.pop(0)
                return Answer.json(said, 400 if "error" in said else 200)
        return super().answer(method, path, form)


@contextmanager
def running_issuer() -> Iterator[TestIssuer]:
    """An issuer that answers for the time of the block."""
    listen = f"127.0.0.1:{free_port()}"
    issuer = TestIssuer(f"http://{listen}")
    with serve(issuer, listen) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield issuer
        finally:
            server.shutdown()
            thread.join()
