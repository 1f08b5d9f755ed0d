"""The ops page over HTTP: read-only, for people who run the coordinator, on an address of its own.

It changes nothing and asks for no certificate, so it is meant for loopback (`kubectl port-forward`, an SSH tunnel). A
request must name an IP address or `localhost` as its host: a web page that gives its own name this address (DNS
rebinding) reads nothing.
"""

import asyncio
import base64
import hashlib
import ipaddress
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import urlsplit

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.coordinator.outward import Registry
from services.coordinator.page import STYLE, Budgets, Seen, render
from services.coordinator.ports import Observation, Rounds

log = get_logger(__name__)

PartT = TypeVar("PartT")

_MOST_HEADER_BYTES: Final = 8192
_REQUEST_S: Final = 5.0
_LOOK_S: Final = 3.0
_MOST_CONNECTIONS: Final = 16
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Overview:
    """Looks at the registry and at the store for the page."""

    def __init__(self, store: Rounds, registry: Registry, clock: Clock) -> None:
        self._store = store
        self._registry = registry
        self._clock = clock

    async def __call__(self) -> Seen:
        """What there is to see; what cannot be read is said in `trouble`."""
        trouble: list[str] = []
        connected, rounds, budgets = await asyncio.gather(
            self._read("who is connected", self._connected(), trouble),
            self._read("jobs", self._rounds(), trouble),
            self._read("budgets", self._budgets(), trouble),
        )
        return Seen(self._clock.now(), rounds, connected, budgets, sorted(trouble))

    async def _read(self, what: str, reading: Awaitable[PartT], trouble: list[str]) -> PartT | None:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await reading
        except FedmeshError as error:
            trouble.append(f"{what}: {error.message}")
        except TimeoutError:
            trouble.append(f"{what}: no answer within {_LOOK_S:g} s")
        return None

    async def _connected(self) -> dict[str, datetime]:
        participants = await self._store.participants()
        return {name: datetime.fromtimestamp(found["since_ms"] / 1000, UTC) for name, found in participants.items()}

    async def _rounds(self) -> list[tuple[str, Observation | None]]:
        jobs = await self._registry.running_jobs()
        return [(job.job_id, await self._store.observe(job.job_id)) for job in jobs]

    async def _budgets(self) -> Budgets:
        answer = await self._registry.budgets()
        return Budgets({item.hospital_id: item.epsilon_left for item in answer.budgets}, answer.epsilon_limit)


class OpsPage:
    """A listener at `address` (host:port) that answers GET / with the page. `run` serves until cancelled."""

    def __init__(self, address: str, look: Callable[[], Awaitable[Seen]]) -> None:
        self._address = address
        self._look = look
        self._open = 0

    async def run(self) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when the address cannot be bound."""
        host, port = self._address.rsplit(":", 1)
        try:
            server = await asyncio.start_server(self._connected, host.strip("[]"), int(port), limit=_MOST_HEADER_BYTES)
        except (OSError, OverflowError) as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot listen on {self._address} for the ops page") from error
        async with server:
            log.info("ops_page", address=self._address)
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            # Somebody who connects and says nothing holds a place for five seconds; a crowd of them gets none.
            if self._open <= _MOST_CONNECTIONS:
                async with asyncio.timeout(_REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await self._answer(head.decode("latin-1")))
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass
        finally:
            self._open -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, head: str) -> bytes:
        first, *lines = head.split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, "not an HTTP request\n")
        hosts = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("host:")]
        if len(hosts) != 1 or not _local(hosts[0]):
            return _response(HTTPStatus.MISDIRECTED_REQUEST, "ask by IP address or as localhost\n")
        if words[0] != "GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET\n", {"Allow": "GET"})
        if words[1].partition("?")[0] != "/":
            return _response(HTTPStatus.NOT_FOUND, "there is one page: /\n")
        return _response(HTTPStatus.OK, render(await self._look()), {"Content-Type": "text/html; charset=utf-8"})


def _local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost":
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _response(status: HTTPStatus, text: str, extra: dict[str, str] | None = None) -> bytes:
    body = text.encode()
    headers = {
        "Content-Type": "text/plain; charset=utf-8",
        **_HEADERS,
        "Content-Length": str(len(body)),
        **(extra or {}),
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
