"""PostgreSQL: a pool, transactions that are run again when PostgreSQL asks for it, and migrations."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import psycopg
from prometheus_client import Counter, Histogram
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from services.common.config import PostgresConfig, read_secret
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger

log = get_logger(__name__)

ResultT = TypeVar("ResultT")
Connection = psycopg.AsyncConnection[DictRow]

# How long a server may take to answer one statement, and one that only asks whether it is there. A server that is
# frozen, or behind a network that lost it, says nothing at all: TCP goes on believing in it for a quarter of an hour.
ANSWER_S: Final = 5.0
CHECK_S: Final = 1.5
# Calls that may wait for each connection of a pool. After an outage everybody comes at once: those beyond are refused
# at no cost and come again, while those within are served in time; an unbounded queue serves nobody in time.
WAITING_PER_CONNECTION: Final = 4
_MAX_TRIES: Final = 8
# A call is made up to four times: so the caller learns of a lost database within its default deadline of 10 s.
_CONNECT_WAIT_S: Final = 2.0
_WAIT_PAUSE_S: Final = 0.5
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
    """A connection that hangs up on a server which does not answer a statement within `answer_s` seconds.

    What waits then ends with psycopg.OperationalError, and so does everything after it. A cancellation would not do:
    psycopg asks the same server to cancel, and waits for that too.
    """

    answer_s: float = ANSWER_S

    async def wait(self, *arguments: Any, **options: Any) -> Any:
        watchdog = asyncio.get_running_loop().call_later(self.answer_s, self._hang_up)
        try:
            return await super().wait(*arguments, **options)
        finally:
            watchdog.cancel()

    async def check(self) -> None:
        """Ask whether the server is there. Raises: psycopg.Error."""
        self.answer_s = CHECK_S
        try:
            await AsyncConnectionPool.check_connection(self)
        finally:
            self.answer_s = ANSWER_S

    def _hang_up(self) -> None:
        log.warning("database_does_not_answer", host=self.info.host, port=self.info.port, seconds=self.answer_s)
        with suppress(OSError), socket.socket(fileno=os.dup(self.fileno())) as line:
            # libpq then reads the end of the stream, as if the server had ended.
            line.shutdown(socket.SHUT_RDWR)


class Database:
    """A connection pool of one service role."""

    def __init__(self, config: PostgresConfig) -> None:
        self._pool: AsyncConnectionPool[AnsweringConnection] = AsyncConnectionPool(
            conninfo(config),
            min_size=1,
            max_size=config.pool_max,
            timeout=_CONNECT_WAIT_S,
            open=False,
            check=AnsweringConnection.check,
            reconnect_timeout=5,
            connection_class=AnsweringConnection,
            kwargs={
                "row_factory": dict_row,
                "options": "-c statement_timeout=20000 -c idle_in_transaction_session_timeout=30000",
                "connect_timeout": 3,
            },
        )
        # Counted here: the pool's own limit also counts those who gave up, and refuses for ever when all of them have.
        self._waiting = 0
        self._most_waiting = WAITING_PER_CONNECTION * config.pool_max

    async def open(self) -> None:
        """Start filling the pool. A database that is away is no error here: calls report it and recover later."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        await self._pool.close()

    def pool_stats(self) -> dict[str, int]:
        """What the pool counts: https://www.psycopg.org/psycopg3/docs/advanced/pool.html#pool-stats"""
        return self._pool.get_stats()

    async def ready(self) -> bool:
        """True when a connection answers."""
        try:
            async with self._connection(timeout_s=1.5) as connection:
                await connection.execute("select 1")
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

    @asynccontextmanager
    async def _connection(self, timeout_s: float | None = None) -> AsyncIterator[Connection]:
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
            yield connection

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[Connection]:
        """A pooled connection. Raises: PoolTimeout, at once when too many wait for one already."""
        if self._waiting >= self._most_waiting:
            raise PoolTimeout("too many wait for a connection")
        async with self._connection() as connection:
            yield connection

    async def run_tx(
        self,
        name: str,
        body: Callable[[Connection], Awaitable[ResultT]],
        isolation: psycopg.IsolationLevel = psycopg.IsolationLevel.REPEATABLE_READ,
    ) -> ResultT:
        """Run `body` in one transaction; it may be run several times. With another isolation than REPEATABLE READ it
        must itself lock what it reads against what others write.

        `body` must have no effect besides its SQL and must make no RPC.

        Raises: FedmeshError(STORE_UNAVAILABLE) when PostgreSQL is away, (STORE_FULL) when its disk is full,
            (LOST_RACE) when conflicts persist; whatever `body` raises.
        """
        with _TX_SECONDS.labels(name).time():
            for attempt in range(1, _MAX_TRIES + 1):
                try:
                    async with store_errors(), self._admitted() as connection:
                        await connection.set_isolation_level(isolation)
                        async with connection.transaction():
                            return await body(connection)
                except (pg.SerializationFailure, pg.DeadlockDetected, pg.UniqueViolation) as error:
                    _TX_RETRIES.labels(name, type(error).__name__).inc()
                    log.info("transaction_retried", name=name, attempt=attempt, reason=type(error).__name__)
                    await asyncio.sleep(0.005 * 2**attempt)
        raise FedmeshError(Code.LOST_RACE, "too many concurrent changes: try again")


@asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Turn a lost or full PostgreSQL into FedmeshError; conflicts and programming errors pass through."""
    try:
        yield
    except (pg.DiskFull, pg.OutOfMemory, pg.IoError) as error:
        raise FedmeshError(Code.STORE_FULL, "the database has no room: free disk space and try again") from error
    except (pg.SerializationFailure, pg.DeadlockDetected):
        raise
    except (psycopg.OperationalError, PoolTimeout) as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the database cannot be reached: try again") from error


def migrate(config: PostgresConfig, schema: str, migrations: Path) -> list[str]:
    """Apply the pending SQL migrations of one schema, in order, under a lock. Safe to run twice and concurrently.

    The role must own the schema or be a member of its owner role. Returns the ids that were applied.

    Raises: FedmeshError(STORE_UNAVAILABLE) when PostgreSQL is away, (WRONG_STATE) when the database has a migration
        that this release does not know.
    """
    from yoyo import get_backend, read_migrations

    try:
        with get_backend(_yoyo_url(conninfo(config), schema)) as backend, backend.lock(timeout=60):
            known = read_migrations(str(migrations))
            pending = backend.to_apply(known)
            applied = [migration.id for migration in pending]
            backend.apply_migrations(pending)
    except psycopg.OperationalError as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the database cannot be reached for migration") from error
    return applied


async def require_migrated(database: Database, schema: str, migrations: Path) -> None:
    """Refuse to run against a schema that is older or newer than this release.

    Raises: FedmeshError(WRONG_STATE) saying which migrations are missing or unknown.
    """
    # A handful of names, read once at start.
    expected = {path.stem for path in migrations.glob("[0-9]*.sql") if ".rollback" not in path.name}  # noqa: ASYNC240

    async def read(connection: Connection) -> set[str]:
        try:
            rows = await connection.execute(
                psycopg.sql.SQL("select migration_id from {}._yoyo_migration").format(psycopg.sql.Identifier(schema))
            )
        except pg.UndefinedTable:
            return set()
        return {row["migration_id"] async for row in rows}

    present = await database.run_tx("schema_version", read)
    missing, unknown = sorted(expected - present), sorted(present - expected)
    if missing:
        raise FedmeshError(Code.WRONG_STATE, f"schema {schema} lacks {', '.join(missing)}: run `fedmesh migrate` first")
    if unknown:
        raise FedmeshError(
            Code.WRONG_STATE, f"schema {schema} has {', '.join(unknown)}, unknown to this release: run a newer one"
        )


def _yoyo_url(dsn: str, schema: str) -> str:
    parts: dict[str, Any] = dict(conninfo_to_dict(dsn))
    user, password = quote(str(parts.pop("user", "")), safe=""), quote(str(parts.pop("password", "")), safe="")
    name = quote(str(parts.pop("dbname", "fedmesh")), safe="")
    host, port = str(parts.pop("host", "")), parts.pop("port", None)
    query = [f"schema={schema}"]
    # A socket's folder, or several servers of which one takes writes: neither fits in front of a URL's path.
    if host.startswith("/") or "," in host:
        query.append(f"host={quote(host, safe='')}")
        host = ""
    location = f"{host}:{port}" if host and port else host
    if port and not host:
        query.append(f"port={port}")
    query += [f"{key}={quote(str(value), safe='')}" for key, value in parts.items()]
    return f"postgresql+psycopg://{user}:{password}@{location}/{name}?{'&'.join(query)}"
