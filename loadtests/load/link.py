"""Locust's end of the connection to the process that makes the calls. Imported by Locust's Python alone."""

import itertools
import json
import socket
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore


class Link:
    """One Unix socket for all users: a line of JSON each way for every question, answered in any order."""

    def __init__(self, path: str) -> None:
        # The standard library's, which Locust has patched for gevent.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._answers = self._socket.makefile("rb")
        self._numbers = itertools.count(1)
        self._open: dict[int, Any] = {}
        self._turn = BoundedSemaphore()
        self._closed = False
        self._reading = gevent.spawn(self._read)

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """Raises: ConnectionError: the other end is gone; RuntimeError: it could not do it."""
        if self._closed:
            raise ConnectionError("the process that makes the calls has ended")
        number, answer = next(self._numbers), AsyncResult()
        self._open[number] = answer
        line = json.dumps({"number": number, "what": what, **fields}).encode() + b"\n"
        with self._turn:
            self._socket.sendall(line)
        found: dict[str, Any] = answer.get()
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        """Questions that are still open end with ConnectionError."""
        self._reading.kill()
        # The socket stays open as long as its file is.
        self._answers.close()
        self._socket.close()

    def _read(self) -> None:
        try:
            for line in self._answers:
                found = json.loads(line)
                self._open.pop(found["number"]).set(found)
        finally:
            self._closed = True
            for answer in self._open.values():
                answer.set_exception(ConnectionError("the process that makes the calls has ended"))
