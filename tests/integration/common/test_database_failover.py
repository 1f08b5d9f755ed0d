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
from services.common.postgres import AnsweringConnection, Connection, Database, migrate
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


async def ask(connection: Connection) -> int:
    row = await (await connection.execute("select 1 as one")).fetchone()
    assert row is not None
    return int(row["one"])


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
    async with opened(postgres.config("audit_service")) as database:
        monkeypatch.setattr(module, "CHECK_S", HUNG_UP_S)
        monkeypatch.setattr(AnsweringConnection, "answer_s", HUNG_UP_S)
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
        frozen.set()
        for refused in (under_way, database.run_tx("later", ask)):
            with pytest.raises(FedmeshError) as caught:
                await refused
            assert caught.value.code is Code.STORE_UNAVAILABLE
        kill_all(freezing, signal.SIGCONT)
        await database.wait()
        assert await database.run_tx("afterwards", ask) == 1


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
