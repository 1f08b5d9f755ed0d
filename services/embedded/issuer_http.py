"""HTTP for the development issuer: small requests, from this machine, one answer a connection."""

import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol

from services.common.errors import Code, FedmeshError

_MOST_BYTES: Final = 16_384
_TIMEOUT_S: Final = 10
_HTML: Final = "text/html; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    status: int
    body: str
    content_type: str = _HTML

    @staticmethod
    def json(content: Mapping[str, Any], status: int = 200) -> "Answer":
        return Answer(status, json.dumps(content), "application/json")


class Answers(Protocol):
    def answer(self, method: str, path: str, form: Mapping[str, str]) -> Answer: ...


def html(text: str, more: str = "") -> str:
    """A page. Both parts are ours, or names that were checked."""
    return f"<!doctype html><title>fedmesh: sign in</title><h1>fedmesh: sign in</h1><p>{text}</p>{more}\n"


def serve(issuer: Answers, listen: str) -> ThreadingHTTPServer:
    """A server that listens already; its caller runs and closes it.

    Raises: FedmeshError(CONFIG_INVALID) when the address cannot be bound.
    """
    host, _, port = listen.rpartition(":")

    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            self._send(path, query)

        def do_POST(self) -> None:
            size = self.headers.get("content-length", "")
            if not size.isascii() or not size.isdigit() or int(size) > _MOST_BYTES:
                self.send_error(413)
                return
            self._send(self.path.partition("?")[0], self.rfile.read(int(size)).decode("utf-8", "replace"))

        def _send(self, path: str, form: str) -> None:
            # A page elsewhere whose name leads here must not read what this machine may.
            named = self.headers.get("host", "").rpartition(":")[0]
            if named not in (host, "localhost"):
                self.send_error(421)
                return
            answer = issuer.answer(self.command, path, dict(urllib.parse.parse_qsl(form)))
            body = answer.body.encode()
            self.send_response(answer.status)
            self.send_header("content-type", answer.content_type)
            self.send_header("content-length", str(len(body)))
            self.send_header("content-security-policy", "default-src 'none'; form-action 'self'")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: paths may hold codes."""

    try:
        return ThreadingHTTPServer((host, int(port)), Handler)
    except (OSError, ValueError, OverflowError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot listen on {listen}: {error}") from error
