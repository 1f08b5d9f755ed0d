"""A database that says nothing at all, and one of several servers that is not there."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from services.audit.store import MIGRATIONS
from services.common import postgres as module
from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.migrations import migrate
from services.common.postgres import AnsweringConnection, Connection, Database, Statements
from services.embedded.processes import ProcessRecord, kill_all
from tests.support.stores import PostgresDatabase

HUNG_UP_S = 0.3


@pytest.fixture
def freezing(postgres: PostgresDatabase) -> Iterator[list[int]]:
    """The server's processes; whatever a test stopped of them goes on afterwards."""
    pid = postgres.server.status().pid
    assert pid is not None
    record = ProcessRecord.of(pid)
    assert record is not None
    pids = record.family()
    yield pids
    kill_all(pids, signal.SIGCONT)


@asynccontextmanager
async def opened(config: PostgresConfig) -> AsyncIterator[Database]:
    database = Database(config)
    await database.open()
    try:
        await database.wait()
        yield database
    finally:
        await database.close()


async def ask(connection: Statements) -> int:
    row = await (await connection.execute("select 1 as one")).fetchone()
    assert row is not None
    return int(row["one"])


async def fill(database: Database, connections: int) -> None:
    """Make the pool open so many connections; each has just answered then."""
    everybody = asyncio.Barrier(connections)

    async def hold(connection: Connection) -> int:
        await everybody.wait()
        return await ask(connection)

    await asyncio.gather(*(database.run_tx("fill", hold) for _ in range(connections)))


def active(postgres: PostgresDatabase, query: str) -> bool:
    """Whether the server is working on a statement."""
    with psycopg.connect(postgres.dsn()) as connection:
        found = connection.execute(
            "select 1 from pg_stat_activity where state = 'active' and query = %s and datname = %s",
            (query, postgres.name),
        )
        return found.fetchone() is not None


async def test_a_service_that_starts_before_its_database_waits_for_it(postgres: PostgresDatabase) -> None:
    postgres.stop()
    database = Database(postgres.config("audit_service"))
    await database.open()
    try:
        with pytest.raises(FedmeshError, match="did not answer for 0 s") as caught:
            await database.wait(0)
        assert caught.value.code is Code.STORE_UNAVAILABLE
        waiting = asyncio.create_task(database.wait())
        await asyncio.to_thread(postgres.start)
        await waiting
        assert await database.run_tx("after", ask) == 1
    finally:
        await database.close()


async def test_a_server_that_freezes_is_away_and_comes_back(
    postgres: PostgresDatabase, freezing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECT_WAIT_S", 60.0)
    async with opened(postgres.config("audit_service").model_copy(update={"pool_max": 2})) as database:
        await fill(database, 2)
        frozen, begun = asyncio.Event(), asyncio.Event()

        async def in_two_steps(connection: Connection) -> int:
            await ask(connection)
            begun.set()
            await frozen.wait()
            return await ask(connection)

        under_way = asyncio.create_task(database.run_tx("under way", in_two_steps))
        await begun.wait()
        # The processes of the pool's connections too, which are younger than the list.
        record = ProcessRecord.of(freezing[0])
        assert record is not None
        freezing += record.family()
        kill_all(freezing, signal.SIGSTOP)
        with monkeypatch.context() as impatient:
            impatient.setattr(module, "CHECK_S", HUNG_UP_S)
            impatient.setattr(AnsweringConnection, "answer_s", HUNG_UP_S)
            # Also by whoever trusts that the server is there.
            impatient.setattr(module, "TRUSTED_S", 3600.0)
            # Soon enough that nobody gives up signing in: the server would wait for the rest of it.
            impatient.setattr(module, "_CONNECT_WAIT_S", HUNG_UP_S)
            frozen.set()
            for refused in (under_way, database.run_tx("later", ask), database.ask("asked", ask)):
                with pytest.raises(FedmeshError) as caught:
                    await refused
                assert caught.value.code is Code.STORE_UNAVAILABLE
        kill_all(freezing, signal.SIGCONT)
        await database.wait()
        await fill(database, 2)
        assert await database.run_tx("afterwards", ask) == 1


async def test_connections_of_a_server_that_restarted_cost_callers_nothing(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRUSTED_S", 3600.0)
    monkeypatch.setattr(module, "_CONNECT_WAIT_S", 60.0)
    async with opened(postgres.config("audit_service")) as database:
        runs: list[str] = []

        async def tell(connection: Statements) -> int:
            runs.append("begun")
            return await ask(connection)

        for use in (lambda: database.run_tx("changes", tell), lambda: database.ask("reads", ask)):
            await fill(database, 3)
            assert database.pool_stats()["pool_available"] == 3
            await asyncio.to_thread(postgres.stop)
            await asyncio.to_thread(postgres.start)
            assert await use() == 1
        # What begins a transaction is lost before anything is done in it.
        assert runs == ["begun"]


async def test_a_connection_is_asked_whether_it_is_there_when_it_was_idle_for_long(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AnsweringConnection] = []
    check = AnsweringConnection.check

    async def note(connection: AnsweringConnection) -> None:
        asked.append(connection)
        await check(connection)

    monkeypatch.setattr(AnsweringConnection, "check", note)
    async with opened(postgres.config("audit_service").model_copy(update={"pool_max": 1})) as database:
        for trusted_s, expected in ((3600.0, 0), (0.0, 4)):
            monkeypatch.setattr(module, "TRUSTED_S", trusted_s)
            asked.clear()
            for _ in range(2):
                assert await database.run_tx("changes", ask) == await database.ask("reads", ask) == 1
            assert len(asked) == expected


async def test_a_question_is_one_statement_that_reads(postgres: PostgresDatabase) -> None:
    async def twice(connection: Statements) -> int:
        return await ask(connection) + await ask(connection)

    async def write(connection: Statements) -> int:
        return (await connection.execute("create temporary table t (i int)")).rowcount

    async with opened(postgres.config("audit_service").model_copy(update={"pool_max": 1})) as database:
        with pytest.raises(RuntimeError, match="one statement"):
            await database.ask("twice", twice)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await database.ask("write", write)
        # What opens it refuses it.
        with pytest.raises(psycopg.errors.DivisionByZero):
            await database.ask("refused", ask, opening=[("select 1", ()), ("select 1 / %s::int", (0,))])
        with pytest.raises(psycopg.errors.DivisionByZero):
            await database.run_tx("refused", ask, opening=[("select 1", ()), ("select 1 / %s::int", (0,))])
        assert await database.ask("afterwards", ask, opening=[("select %s::int", (1,)), ("select 2", ())]) == 1


async def test_a_question_that_is_given_up_leaves_the_connection_to_others(postgres: PostgresDatabase) -> None:
    async def sleep(connection: Statements) -> int:
        return (await connection.execute("select pg_sleep(60)")).rowcount

    async with opened(postgres.config("audit_service").model_copy(update={"pool_max": 1})) as database:
        asking = asyncio.create_task(database.ask("sleeps", sleep))
        async with asyncio.timeout(30):
            while not active(postgres, "select pg_sleep(60)"):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await database.ask("afterwards", ask) == 1


async def test_a_full_queue_for_connections_refuses_at_once_and_serves_who_waits(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECT_WAIT_S", 60.0)
    config = postgres.config("audit_service").model_copy(update={"pool_max": 1})
    async with opened(config) as database:
        held, release = asyncio.Event(), asyncio.Event()

        async def hold(connection: Connection) -> int:
            held.set()
            await release.wait()
            return await ask(connection)

        first = asyncio.create_task(database.run_tx("first", hold))
        await held.wait()
        waiting = [asyncio.create_task(database.run_tx("waiting", ask)) for _ in range(module.WAITING_PER_CONNECTION)]
        async with asyncio.timeout(30):
            while database._pool.get_stats().get("requests_waiting") != len(waiting):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        with pytest.raises(FedmeshError) as caught:
            async with asyncio.timeout(30):
                await database.run_tx("too many", ask)
        assert caught.value.code is Code.STORE_UNAVAILABLE
        release.set()
        assert await asyncio.gather(first, *waiting) == [1] * (1 + module.WAITING_PER_CONNECTION)


async def test_several_servers_are_tried_by_migrations_and_pools(postgres: PostgresDatabase, tmp_path: Path) -> None:
    def several(role: str) -> PostgresConfig:
        config = postgres.config(role)
        parts = psycopg.conninfo.conninfo_to_dict(config.dsn)
        parts |= {
            "host": f"{tmp_path},{parts['host']}",
            "port": f"{parts['port']},{parts['port']}",
            "target_session_attrs": "read-write",
        }
        dsn = psycopg.conninfo.make_conninfo(**{name: str(value) for name, value in parts.items()})
        return config.model_copy(update={"dsn": dsn})

    assert migrate(several("audit_migrator"), "audit", MIGRATIONS)
    async with opened(several("audit_service")) as database:
        assert await database.run_tx("ask", ask) == 1


async def test_a_call_that_is_cancelled_at_any_step_leaves_no_connection_that_answers_otherwise(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process that has much to do: psycopg lets others run between its steps.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", 0.0)

    async def count(connection: Statements) -> int:
        return (await connection.execute("select generate_series(1, 3)")).rowcount

    async with opened(postgres.config("audit_service").model_copy(update={"pool_max": 1})) as database:
        assert await database.run_tx("fill", count) == 3
        for steps in range(12):
            for work in (database.run_tx, database.ask):
                task = asyncio.create_task(work("cancelled", count))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert await database.run_tx("after", count) == 3, (steps, work)


async def test_who_falls_silent_in_a_transaction_keeps_no_lock(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    async with opened(postgres.config("audit_service")) as database:
        locked, ended = asyncio.Event(), asyncio.Event()

        async def lock(connection: Connection) -> int:
            await connection.execute("select pg_advisory_xact_lock(7)")
            locked.set()
            return 0

        async def fall_silent(connection: Connection) -> int:
            await lock(connection)
            await ended.wait()
            return await ask(connection)

        silent = asyncio.create_task(database.run_tx("silent", fall_silent))
        await locked.wait()
        assert await database.run_tx("waiting", lock) == 0
        ended.set()
        # No INTERNAL: the caller comes again.
        with pytest.raises(FedmeshError) as caught:
            await silent
        assert caught.value.code is Code.STORE_UNAVAILABLE
