"""PostgreSQL: a pool, and transactions that are run again when PostgreSQL asks for it."""

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, Protocol, TypeVar

import psycopg
from prometheus_client import Counter, Histogram
from psycopg import errors as pg
from psycopg.abc import Params, QueryNoTemplate
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from services.common.config import PostgresConfig, read_secret
from services.common.errors import Code, FedmeshError
from services.common.postgres_servers import Servers
from services.common.telemetry import get_logger

log = get_logger(__name__)

ResultT = TypeVar("ResultT")
Connection = psycopg.AsyncConnection[DictRow]
Statement = tuple[QueryNoTemplate, Params]
"""SQL and its parameters."""


class Statements(Protocol):
    """Takes statements of one transaction: a connection, or a `Question`."""

    async def execute(
        self, query: QueryNoTemplate, params: Params | None = None, *, binary: bool = False
    ) -> psycopg.AsyncCursor[DictRow]: ...


# How long a server may take to answer one statement, and one that only asks whether it is there. A server that is
# frozen, or behind a network that lost it, says nothing at all: TCP goes on believing in it for a quarter of an hour.
ANSWER_S: Final = 5.0
CHECK_S: Final = 1.5
# How long a service may say nothing in a transaction before PostgreSQL ends it: one that is frozen there keeps its
# locks, the audit log's among them, and nothing but its own work is ever waited for there.
IDLE_S: Final = 3.0
# A connection that ended a transaction so recently is not asked whether it is there.
TRUSTED_S: Final = 0.5
# Calls that may wait for each connection of a pool. After an outage everybody comes at once: those beyond are refused
# at no cost and come again, while those within are served in time; an unbounded queue serves nobody in time.
WAITING_PER_CONNECTION: Final = 4
_MAX_TRIES: Final = 8
# A call is made up to four times: so the caller learns of a lost database within its default deadline of 10 s.
_CONNECT_WAIT_S: Final = 2.0
_WAIT_PAUSE_S: Final = 0.5
_BEGIN: Final = {
    isolation: f"BEGIN ISOLATION LEVEL {isolation.name.replace('_', ' ')}".encode()
    for isolation in psycopg.IsolationLevel
}
_BEGIN_READING: Final = _BEGIN[psycopg.IsolationLevel.REPEATABLE_READ] + b" READ ONLY"
_TX_SECONDS: Final = Histogram(
    "fedmesh_postgres_transaction_seconds", "Time of transactions, retries included", ["name"]
)
_TX_RETRIES: Final = Counter("fedmesh_postgres_transaction_retries_total", "Transactions run again", ["name", "reason"])


def conninfo(config: PostgresConfig) -> str:
    """The libpq connection string with its password filled in."""
    if config.password_file is None:
        return config.dsn
    return make_conninfo(config.dsn, password=read_secret(config.password_file))


class AnsweringConnection(psycopg.AsyncConnection[DictRow]):
    """A connection that hangs up on a server which does not answer a statement within `answer_s` seconds, or CHECK_S
    where there is nothing to do for it.

    What waits then ends with psycopg.OperationalError, and so does everything after it. A cancellation would not do:
    psycopg asks the same server to cancel, and waits for that too.
    """

    answer_s: float = ANSWER_S
    _nothing_to_do = False
    # By the monotonic clock: when it last ended a transaction, or was asked whether it is there.
    answered_at: float = -math.inf

    async def wait(self, *arguments: Any, **options: Any) -> Any:
        seconds = CHECK_S if self._nothing_to_do else self.answer_s
        watchdog = asyncio.get_running_loop().call_later(seconds, self._hang_up, seconds)
        try:
            return await super().wait(*arguments, **options)
        finally:
            watchdog.cancel()

    async def check(self) -> None:
        """Ask whether the server is there. Raises: psycopg.Error."""
        with self._quick():
            await AsyncConnectionPool.check_connection(self)
        self.answered_at = time.monotonic()

    async def begin(self, isolation: psycopg.IsolationLevel, opening: Sequence[Statement]) -> None:
        """Begin a transaction with the statements that open it, in one round trip. Raises: psycopg.Error."""
        with self._quick():
            async with self.pipeline():
                await self.execute(_BEGIN[isolation])
                for statement in opening:
                    await self.execute(*statement)

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[psycopg.AsyncPipeline]:
        """As psycopg's, which stays in that mode when it is cancelled as it enters it: then no statement would be
        answered when it is made, and every count of rows be -1. Such a connection is closed. Raises: psycopg.Error.
        """
        try:
            async with super().pipeline() as pipeline:
                yield pipeline
        finally:
            # Pipelines do not nest here.
            if self.info.pipeline_status is not psycopg.pq.PipelineStatus.OFF:
                await self.close()

    async def end(self) -> None:
        """Commit. Raises: psycopg.Error."""
        await self.commit()
        self.answered_at = time.monotonic()

    @contextmanager
    def _quick(self) -> Iterator[None]:
        self._nothing_to_do = True
        try:
            yield
        finally:
            self._nothing_to_do = False

    def _hang_up(self, seconds: float) -> None:
        log.warning("database_does_not_answer", host=self.info.host, port=self.info.port, seconds=seconds)
        with suppress(OSError), socket.socket(fileno=os.dup(self.fileno())) as line:
            # libpq then reads the end of the stream, as if the server had ended.
            line.shutdown(socket.SHUT_RDWR)


class Question:
    """A transaction of one statement that reads: the first makes it begin and end, all in one round trip."""

    def __init__(self, connection: AnsweringConnection, opening: Sequence[Statement]) -> None:
        self._connection = connection
        self._opening = opening
        self._asked = False

    async def execute(
        self, query: QueryNoTemplate, params: Params | None = None, *, binary: bool = False
    ) -> psycopg.AsyncCursor[DictRow]:
        """As psycopg's. What an opening statement refuses, PostgreSQL does not go on with.

        Raises: psycopg.Error; RuntimeError for a second statement.
        """
        if self._asked:
            raise RuntimeError("a question is one statement: run a transaction")
        self._asked = True
        async with self._connection.pipeline():
            await self._connection.execute(_BEGIN_READING)
            for statement in self._opening:
                await self._connection.execute(*statement)
            cursor = await self._connection.execute(query, params, binary=binary)
            await self._connection.execute(b"COMMIT")
        self._connection.answered_at = time.monotonic()
        return cursor


async def _connect(conninfo: str) -> AnsweringConnection:
    """Connect to one server. Raises: psycopg.OperationalError."""
    return await AnsweringConnection.connect(
        conninfo,
        autocommit=True,
        row_factory=dict_row,
        options=f"-c statement_timeout=20000 -c idle_in_transaction_session_timeout={IDLE_S * 1000:.0f}",
        connect_timeout=3,
    )


def _pooled(servers: Servers[AnsweringConnection]) -> type[AnsweringConnection]:
    """What a pool takes for a class whose connections go to the server of these that takes writes."""

    class Pooled(AnsweringConnection):
        @classmethod
        async def connect(cls, _conninfo: str = "", **_settings: Any) -> Any:  # type: ignore[override]
            return await servers.await_one()

    return Pooled


class Database:
    """A connection pool of one service role."""

    def __init__(self, config: PostgresConfig) -> None:
        self._servers = Servers(conninfo(config), _connect)
        self._pool: AsyncConnectionPool[AnsweringConnection] = AsyncConnectionPool(
            min_size=1,
            max_size=config.pool_max,
            num_workers=config.pool_max,
            timeout=_CONNECT_WAIT_S,
            open=False,
            check=self._check,
            # `Servers` waits for a server itself: the pool would look at ever longer intervals, and give up.
            connection_class=_pooled(self._servers),
        )
        # One connection that was lost puts all those in doubt that answered before.
        self._doubted_at = -math.inf
        # Counted here: the pool's own limit also counts those who gave up, and refuses for ever when all of them have.
        self._waiting = 0
        self._most_waiting = WAITING_PER_CONNECTION * config.pool_max

    async def open(self) -> None:
        """Start filling the pool. A database that is away is no error here: calls report it and recover later."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        self._servers.close()
        await self._pool.close()

    def pool_stats(self) -> dict[str, int]:
        """What the pool counts: https://www.psycopg.org/psycopg3/docs/advanced/pool.html#pool-stats"""
        return self._pool.get_stats()

    async def ready(self) -> bool:
        """True when a connection answers."""
        try:
            async with self._connection(timeout_s=1.5) as connection:
                await connection.check()
        except (psycopg.Error, PoolTimeout, OSError):
            return False
        return True

    async def wait(self, patience_s: float = 30.0) -> None:
        """Return as soon as PostgreSQL answers, for a service that starts while it fails over or is slow.

        Raises: FedmeshError(STORE_UNAVAILABLE) when it did not answer for `patience_s` seconds.
        """
        ending = time.monotonic() + patience_s
        while not await self.ready():
            if time.monotonic() >= ending:
                raise FedmeshError(
                    Code.STORE_UNAVAILABLE, f"PostgreSQL did not answer for {patience_s:g} s: see that it runs"
                )
            log.warning("postgres_awaited")
            await asyncio.sleep(_WAIT_PAUSE_S)

    async def _check(self, connection: AnsweringConnection) -> None:
        """Ask a connection whether it is there, unless it just answered. Raises: psycopg.Error."""
        if connection.answered_at <= max(self._doubted_at, time.monotonic() - TRUSTED_S):
            await connection.check()

    @asynccontextmanager
    async def _connection(self, timeout_s: float | None = None) -> AsyncIterator[AnsweringConnection]:
        """A pooled connection. The pool drops a cancellation that comes while it hands one over; here it is heeded."""
        task = asyncio.current_task()
        cancelled_before = 0 if task is None else task.cancelling()
        async with AsyncExitStack() as stack:
            self._waiting += 1
            try:
                connection = await stack.enter_async_context(self._pool.connection(timeout=timeout_s))
            finally:
                self._waiting -= 1
            if task is not None and task.cancelling() > cancelled_before:
                raise asyncio.CancelledError
            try:
                yield connection
            finally:
                if connection.closed:
                    self._doubted_at = time.monotonic()

    @asynccontextmanager
    async def _admitted(self, timeout_s: float) -> AsyncIterator[AnsweringConnection]:
        """A pooled connection. Raises: PoolTimeout, at once when too many wait for one already."""
        if self._waiting >= self._most_waiting:
            raise PoolTimeout("too many wait for a connection")
        async with self._connection(timeout_s) as connection:
            yield connection

    async def _use(self, use: Callable[[AnsweringConnection], Awaitable[ResultT]]) -> ResultT:
        """`use` a pooled connection; the pool rolls back what fails. One that turns out to be lost before anything was
        done on it (`_LostAtOnceError`) is passed over for another one.
        """
        ending = time.monotonic() + _CONNECT_WAIT_S
        while True:
            with suppress(_LostAtOnceError):
                async with store_errors(), self._admitted(ending - time.monotonic()) as connection:
                    return await use(connection)

    async def run_tx(
        self,
        name: str,
        body: Callable[[Connection], Awaitable[ResultT]],
        isolation: psycopg.IsolationLevel = psycopg.IsolationLevel.REPEATABLE_READ,
        *,
        opening: Sequence[Statement] = (),
    ) -> ResultT:
        """Run `body` in one transaction; it may be run several times. With another isolation than REPEATABLE READ it
        must itself lock what it reads against what others write.

        `body` must have no effect besides its SQL and must make no RPC. opening: run before it, with BEGIN.

        Raises: FedmeshError(STORE_UNAVAILABLE) when PostgreSQL is away, (STORE_FULL) when its disk is full,
            (LOST_RACE) when conflicts persist; whatever `body` or the opening raises.
        """

        async def use(connection: AnsweringConnection) -> ResultT:
            with _lost_at_once(connection):
                await connection.begin(isolation, opening)
            result = await body(connection)
            await connection.end()
            return result

        with _TX_SECONDS.labels(name).time():
            for attempt in range(1, _MAX_TRIES + 1):
                try:
                    return await self._use(use)
                except (pg.SerializationFailure, pg.DeadlockDetected, pg.UniqueViolation) as error:
                    _TX_RETRIES.labels(name, type(error).__name__).inc()
                    log.info("transaction_retried", name=name, attempt=attempt, reason=type(error).__name__)
                    await asyncio.sleep(0.005 * 2**attempt)
        raise FedmeshError(Code.LOST_RACE, "too many concurrent changes: try again")

    async def ask(
        self, name: str, body: Callable[[Statements], Awaitable[ResultT]], *, opening: Sequence[Statement] = ()
    ) -> ResultT:
        """Run `body`, which makes exactly one statement, and one that reads, in a transaction and one round trip. It
        may be run several times.

        Raises: as `run_tx`.
        """

        async def use(connection: AnsweringConnection) -> ResultT:
            # The statement is the first thing on its connection, and it reads: lost with it, nothing was done.
            with _lost_at_once(connection):
                return await body(Question(connection, opening))

        with _TX_SECONDS.labels(name).time():
            return await self._use(use)


class _LostAtOnceError(Exception):
    """A connection was lost before anything was done on it."""


@contextmanager
def _lost_at_once(connection: AnsweringConnection) -> Iterator[None]:
    """Raises: _LostAtOnceError for what fails because the connection was lost."""
    try:
        yield
    except psycopg.OperationalError as error:
        if connection.closed:
            raise _LostAtOnceError from error
        raise


@asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Turn a lost or full PostgreSQL into FedmeshError; conflicts and programming errors pass through."""
    try:
        yield
    except (pg.DiskFull, pg.OutOfMemory, pg.IoError) as error:
        raise FedmeshError(Code.STORE_FULL, "the database has no room: free disk space and try again") from error
    except (pg.SerializationFailure, pg.DeadlockDetected):
        raise
    except (psycopg.OperationalError, pg.IdleInTransactionSessionTimeout, PoolTimeout) as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the database cannot be reached: try again") from error
