"""Finds the server that takes writes among those that a connection string names, and waits for one while there is none.

libpq asks the servers one after another, and gives each its whole `connect_timeout`: with a first one that is frozen or
cut off every new connection costs seconds, though the writer is the next one. Here the one that took writes last comes
first, and each further one is asked beside those that have not answered within `BESIDE_S`, as RFC 8305 does it for
addresses.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, Protocol, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from services.common.telemetry import get_logger

log = get_logger(__name__)

# Far above what signing in takes.
BESIDE_S: Final = 0.25
# Between two looks for a server while none takes writes. A failover is over within a minute; what lasts longer, such as
# a wrong password, is not worth as many lines in PostgreSQL's log.
PAUSE_S: Final = 0.25
LONG_PAUSE_S: Final = 2.0
_FAILOVER_S: Final = 60.0
_LISTS: Final = ("host", "hostaddr", "port")


class _Closable(Protocol):
    async def close(self) -> None: ...


ConnectionT = TypeVar("ConnectionT", bound=_Closable)


class Servers(Generic[ConnectionT]):
    """The servers of one connection string, for one event loop. connect: makes a connection to one of them; it raises
    psycopg.OperationalError when the server is away, or takes no writes where the string wants one that does.
    """

    def __init__(self, conninfo: str, connect: Callable[[str], Awaitable[ConnectionT]]) -> None:
        """Raises: psycopg.ProgrammingError for a string that is none."""
        self._each = split(conninfo)
        self._connect = connect
        self._last = 0
        self._looking = asyncio.Lock()
        self._closed = asyncio.Event()

    async def connect(self) -> ConnectionT:
        """A connection to the first server that gives one.

        Raises: psycopg.Error of the server that was asked last, when all have refused.
        """
        untried = [*range(self._last, len(self._each)), *range(self._last)]
        trying: dict[asyncio.Task[ConnectionT], int] = {}
        refused: BaseException | None = None
        try:
            while untried or trying:
                if untried:
                    number = untried.pop(0)
                    trying[asyncio.ensure_future(self._connect(self._each[number]))] = number
                done, _ = await asyncio.wait(
                    trying, timeout=BESIDE_S if untried else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    refused = task.exception()
                    if refused is None:
                        self._last = trying.pop(task)
                        return task.result()
                    del trying[task]
        finally:
            await _give_up(trying)
        assert refused is not None
        raise refused

    async def await_one(self) -> ConnectionT:
        """As `connect`, as soon as there is a server, however long that takes. One caller at a time looks for it: the
        others would only keep the servers busy that do not take writes.

        Raises: psycopg.Error for what no waiting mends; psycopg.OperationalError after `close`.
        """
        async with self._looking:
            try:
                return await self.connect()
            except psycopg.OperationalError as error:
                if self._closed.is_set():
                    raise
                log.warning("postgres_has_no_writer", reason=str(error).splitlines()[-1])
                connection = await self._look(error)
            log.info("postgres_has_a_writer")
            return connection

    async def _look(self, refused: psycopg.OperationalError) -> ConnectionT:
        """Ask every server again and again; one that says nothing keeps none of the others waiting."""
        began = time.monotonic()
        trying: dict[asyncio.Task[ConnectionT], int] = {}
        not_before = dict.fromkeys(range(len(self._each)), began + PAUSE_S)
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            while not self._closed.is_set():
                now = time.monotonic()
                for number, moment in not_before.items():
                    if moment <= now and number not in trying.values():
                        trying[asyncio.ensure_future(self._connect(self._each[number]))] = number
                resting = [moment for number, moment in not_before.items() if number not in trying.values()]
                await asyncio.wait(
                    {closing, *trying},
                    timeout=max(0.0, min(resting) - now) if resting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                pause_s = PAUSE_S if time.monotonic() - began < _FAILOVER_S else LONG_PAUSE_S
                for task in [task for task in trying if task.done()]:
                    number = trying.pop(task)
                    error = task.exception()
                    if error is None:
                        self._last = number
                        return task.result()
                    if not isinstance(error, psycopg.OperationalError):
                        raise error
                    refused = error
                    not_before[number] = time.monotonic() + pause_s
            raise refused
        finally:
            closing.cancel()
            await _give_up(trying)

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed.set()


def split(conninfo: str) -> list[str]:
    """A connection string for each server that one names. Raises: psycopg.ProgrammingError for no such string."""
    settings: dict[str, Any] = dict(conninfo_to_dict(conninfo))
    lists = {name: str(settings[name]).split(",") for name in _LISTS if settings.get(name)}
    count = max((len(each) for name, each in lists.items() if name != "port"), default=1)
    found = []
    for number in range(count):
        # One port for all servers is allowed.
        own = {name: each[number] if len(each) > 1 else each[0] for name, each in lists.items()}
        found.append(make_conninfo(**{**settings, **own}))
    return found


async def _give_up(tasks: "dict[asyncio.Task[ConnectionT], int]") -> None:
    for task in tasks:
        task.cancel()
    for made in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(made, BaseException):
            await made.close()
