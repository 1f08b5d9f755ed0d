"""What the database itself refuses, and what the service does when it is gone or was tampered with."""

import asyncio
import time

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from services.audit.domain.event import Event
from services.audit.store import MIGRATIONS
from services.common.errors import Code, FedmeshError
from services.common.identity import parse_identity
from services.common.ids import new_id
from services.common.migrations import migrate, require_migrated
from services.common.postgres import Database
from services.transparency.checkpoint import open_checkpoint
from services.transparency.merkle import leaf_hash, tree_root

from .conftest import Replica, World, event

TABLES = ("entries", "events", "nodes", "checkpoints", "cosignatures", "alarms")
# What the service may only read; the first partition it may not touch but through the whole table.
OWNERS = ("partitions", "archives")
CHANGES = {
    "entries": "update audit.entries set leaf = '\\x00'",
    "entries_0": "update audit.entries_0 set leaf = '\\x00'",
    "events": "update audit.events set index = index + 1",
    "partitions": "update audit.partitions set level = level",
    "archives": "update audit.archives set manifest = ''",
    "nodes": "update audit.nodes set hash = hash",
    "checkpoints": "update audit.checkpoints set note = ''",
    "cosignatures": "update audit.cosignatures set line = ''",
    "alarms": "update audit.alarms set reason = ''",
}

SOURCE = parse_identity("spiffe://consortium.test/service/registry")
OUTSIDE = Event(new_id(), "job.created", "2026-01-02T03:04:05.000000000Z", str(SOURCE), "job/17", "{}")


async def fill(world: World, replica: Replica, count: int = 5) -> None:
    async with world.client(replica) as coordinator:
        await coordinator.append(*(event() for _ in range(count)))


@pytest.mark.parametrize("role", ["audit_service", "audit_migrator", "postgres"])
async def test_nobody_changes_or_removes_rows(world: World, replica: Replica, role: str) -> None:
    await fill(world, replica)
    with psycopg.connect(world.postgres.dsn(role), autocommit=True) as connection:
        for table in CHANGES:
            for statement in (CHANGES[table], f"delete from audit.{table}", f"truncate audit.{table}"):
                with pytest.raises(pg.InsufficientPrivilege):
                    connection.execute(statement.encode())


async def test_playing_back_replication_does_not_get_round_the_triggers(world: World, replica: Replica) -> None:
    await fill(world, replica)
    with psycopg.connect(world.postgres.dsn()) as connection:
        connection.execute("set session_replication_role = replica")
        with pytest.raises(pg.InsufficientPrivilege):
            connection.execute("delete from audit.entries")


async def test_the_service_has_no_more_rights_than_it_needs(world: World) -> None:
    query = "select privilege_type from information_schema.role_table_grants where grantee = %s and table_name = %s"
    with psycopg.connect(world.postgres.dsn("audit_service")) as connection:
        for table in TABLES:
            held = {row[0] for row in connection.execute(query, ("audit_service", table))}
            assert held == {"SELECT", "INSERT"}
        for table in OWNERS:
            assert {row[0] for row in connection.execute(query, ("audit_service", table))} == {"SELECT"}
        assert not connection.execute(query, ("audit_service", "entries_0")).fetchall()
        owner = "select distinct tableowner from pg_tables where schemaname = 'audit' and tablename = any(%s)"
        assert connection.execute(owner, ([*TABLES, *OWNERS],)).fetchall() == [("audit_owner",)]
        with pytest.raises(pg.InsufficientPrivilege):
            connection.execute("create table audit.more ()")
    with psycopg.connect(world.postgres.dsn("registry_service")) as connection, pytest.raises(pg.InsufficientPrivilege):
        connection.execute("select 1 from audit.entries")


async def test_the_database_checks_what_it_is_given(world: World) -> None:
    statement = (
        "insert into audit.entries (index, leaf, leaf_hash, recorded_at) values (0, '\\x61', sha256('\\x61'), now())"
    )
    with psycopg.connect(world.postgres.dsn("audit_service")) as connection, pytest.raises(pg.CheckViolation):
        connection.execute(statement.encode())


async def test_migrating_twice_does_nothing_and_the_schema_is_known(world: World) -> None:
    assert migrate(world.postgres.config("audit_migrator"), "audit", MIGRATIONS) == []
    database = Database(world.postgres.config("audit_service"))
    await database.open()
    try:
        await require_migrated(database, "audit", MIGRATIONS)
    finally:
        await database.close()


@pytest.mark.parametrize(
    "change",
    [
        "update audit.nodes set hash = sha256('forged') where level = 2",
        "delete from audit.nodes where level = 2",
        "insert into audit.checkpoints values (6, sha256('forged'), 'forged', now())",
    ],
)
async def test_nothing_is_signed_on_top_of_a_tree_that_was_changed(world: World, replica: Replica, change: str) -> None:
    await fill(world, replica)
    with psycopg.connect(world.postgres.dsn()) as connection:
        connection.execute("alter table audit.nodes disable trigger append_only")
        connection.execute(change.encode())
    with pytest.raises(FedmeshError) as caught:
        await fill(world, replica, 1)
    assert caught.value.code is Code.WRONG_STATE
    with pytest.raises(FedmeshError):
        await replica.log.require_own_log()


async def test_a_missing_entry_is_not_passed_over(world: World, replica: Replica) -> None:
    await fill(world, replica)
    with psycopg.connect(world.postgres.dsn()) as connection:
        connection.execute("alter table audit.entries disable trigger append_only")
        connection.execute("delete from audit.entries where index = 2")
    with pytest.raises(FedmeshError) as caught:
        [item async for item in replica.log.entries(0, 0)]
    assert caught.value.code is Code.WRONG_STATE


async def test_a_database_that_stops_and_comes_back_loses_and_doubles_nothing(world: World, replica: Replica) -> None:
    sent = [[event(sender=sender, number=number) for number in range(30)] for sender in range(8)]
    busy, stopped = asyncio.Event(), asyncio.Event()
    places: dict[str, int] = {}

    async def sender(number: int) -> None:
        async with world.client(replica) as client:
            for position, item in enumerate(sent[number]):
                if position == 15:
                    await stopped.wait()
                answer = await client.append(item, patience_s=60)
                places[item.event_id] = answer.placements[0].index
                if len(places) >= 60:
                    busy.set()

    async def outage() -> None:
        await busy.wait()
        await asyncio.to_thread(world.postgres.stop)
        stopped.set()
        # Asked directly: through a channel, gRPC's own retries would outlast the deadline.
        answers = await asyncio.gather(
            replica.log.append(SOURCE, new_id(), [OUTSIDE]), replica.log.checkpoint(), return_exceptions=True
        )
        assert [answer.code for answer in answers if isinstance(answer, FedmeshError)] == [Code.STORE_UNAVAILABLE] * 2
        await asyncio.to_thread(world.postgres.start)

    await asyncio.gather(outage(), *(sender(number) for number in range(8)))
    listed = [item async for item in replica.log.entries(0, 0)]
    known = {item.event_id for row in sent for item in row}
    by_index = dict(listed)
    assert len(places) == len(known) == len(set(places.values())) == 240
    assert all(event_id.encode() in by_index[index] for event_id, index in places.items())
    # The refused append of the outage left nothing behind, and what was sent twice stands once.
    assert sorted(by_index) == list(range(240))
    checkpoint = open_checkpoint(await replica.log.checkpoint(), replica.verifier)
    assert tree_root(leaf_hash(leaf) for _, leaf in listed) == checkpoint.root


async def test_a_restart_and_a_proof_read_a_handful_of_rows(world: World) -> None:
    """However long the log is: counted by PostgreSQL itself."""

    def rows_read() -> int:
        query = (
            "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables"
            " where schemaname = 'audit' and (relname = any(%s) or relname like 'entries_%%')"
        )
        others = "select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        with psycopg.connect(world.postgres.dsn(), autocommit=True) as connection:
            # A session tells its figures when it ends, which is a moment after its client has left.
            deadline = time.monotonic() + 60
            while connection.execute(others).fetchone() is not None:
                assert time.monotonic() < deadline, "a session never ended"
                time.sleep(0.02)
            row = connection.execute(query, ([*TABLES, *OWNERS],)).fetchone()
        assert row is not None
        return int(row[0])

    size = 4000
    async with world.replica() as replica, world.client(replica) as coordinator:
        for _ in range(size // 500):
            await coordinator.append(*(event() for _ in range(500)))
    before = rows_read()
    async with world.replica() as replica:
        await replica.log.require_own_log()
        await replica.log.inclusion(1234, 0)
        await replica.log.consistency(2345, 0)
    assert 0 < rows_read() - before < 8 * size.bit_length()


def test_table_names_in_these_tests_are_those_of_the_schema(world: World) -> None:
    with psycopg.connect(world.postgres.dsn()) as connection:
        found = connection.execute(
            sql.SQL("select tablename from pg_tables where schemaname = 'audit' and tablename not like {}").format(
                sql.Literal("%yoyo%")
            )
        )
        assert {row[0] for row in found} == {*TABLES, *OWNERS, "partitioning", "entries_0", "_compatibility"}
