"""A log in partitions of eight entries: it grows over their bounds, old ones go into archives, and everything still
proves."""

import asyncio
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from fedmesh.audit.v1 import audit_pb2 as pb
from psycopg import errors as pg
from typer.testing import CliRunner

from services.audit.archive_events import ArchiveEvents
from services.audit.archiving import write_archives
from services.audit.detaching import detach_archives
from services.audit.domain.event import Leaf, make_leaf
from services.audit.fsck import Report, check_log
from services.audit.servicer import read_event
from services.audit.store import MIGRATIONS
from services.audit.store.postgres import PostgresStore
from services.cli.audit import app, stream_export
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.ids import new_id
from services.common.migrations import migrate
from services.common.postgres import Database
from services.embedded.ca import create_ca
from services.secure_sum.roster import MemberKeys, found, save_roster_file, sign_roster
from services.transparency import export
from services.transparency.archive import Part, verify_archive
from services.transparency.checkpoint import (
    Checkpoint,
    generate_key,
    load_signing_key,
    open_checkpoint,
    sign_checkpoint,
)
from services.transparency.merkle import Frontier, leaf_hash, verify_consistency, verify_inclusion
from tests.support.stores import PostgresDatabase

from .conftest import CONSORTIUM, Replica, World, event
from .hospitals import Hospitals

WIDE = 8
AUDIT = Identity(CONSORTIUM, Kind.SERVICE, "audit")


def narrow(folder: Path, *names: str) -> Path:
    """The migrations of this release, but for partitions of eight entries."""
    folder.mkdir()
    for path in MIGRATIONS.glob("*.sql"):
        if not names or path.name[:4] in names:
            (folder / path.name).write_text(path.read_text().replace("values (22, 24)", "values (3, 24)"))
    return folder


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """What `world` migrates by."""
    return narrow(tmp_path / "migrations")


@dataclass
class Archived:
    """A log of 29 entries, all witnessed: three full partitions, of which archives are in `folder`."""

    world: World
    replica: Replica
    hospitals: Hospitals
    folder: Path
    events: list[pb.Event]

    def detach(self, role: str = "audit_migrator") -> int:
        config = self.world.postgres.config(role)
        rosters = [self.hospitals.roster]
        return detach_archives(config, self.folder, self.replica.verifier, rosters, lambda _: None)

    async def write(self, months: int = 0) -> int:
        config = self.world.postgres.config("audit_service")
        rosters = [self.hospitals.roster]
        return await write_archives(config, self.folder, self.replica.verifier, rosters, months, lambda _: None)

    async def check(self, archives: Path | None = None) -> Report:
        return await check_log(self.world.postgres.config("audit_service"), self.replica.verifier, archives)

    def allow(self) -> None:
        """Let entries of any age go."""
        with psycopg.connect(self.world.postgres.dsn()) as connection:
            connection.execute("update audit.partitioning set months_online = 0")


@pytest.fixture
async def log(world: World, replica: Replica, tmp_path: Path) -> Archived:
    (tmp_path / "hospitals").mkdir()
    hospitals = Hospitals(world, tmp_path / "hospitals")
    events = [event(number=number) for number in range(29)]
    async with world.client(replica) as coordinator:
        await coordinator.append(*events[:20])
        await coordinator.append(*events[20:])
    assert set(await hospitals.look(replica)) == {"cosigned"}
    made = Archived(world, replica, hospitals, tmp_path / "archives", events)
    assert await made.write() == 3
    return made


def partitions(world: World) -> list[str]:
    with psycopg.connect(world.postgres.dsn()) as connection:
        rows = connection.execute(
            "select relname from pg_inherits join pg_class on oid = inhrelid"
            " where inhparent = 'audit.entries'::regclass"
        )
        return sorted((name for (name,) in rows), key=lambda name: int(name.split("_")[1]))


async def test_appends_make_the_partitions_that_they_need(world: World, replica: Replica) -> None:
    async with world.replica(max_events=3) as other, world.client(replica) as one, world.client(other) as two:
        many = await one.append(*(event() for _ in range(100)))
        await asyncio.gather(*(client.append(event(), event()) for client in (one, two) for _ in range(20)))
        again = await one.append(event())
    assert [item.index for item in many.placements] == list(range(100))
    assert again.placements[0].index == 180
    made = partitions(world)
    assert made == [f"entries_{WIDE * number}" for number in range(len(made))]
    assert WIDE * len(made) >= 181 + WIDE // 2, "and the next one before it is needed"
    report = await check_log(world.postgres.config("audit_service"), replica.verifier)
    assert (report.wrong, report.entries) == (0, 181)


async def test_who_uses_the_table_delays_a_partition_and_no_append(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator:
        await coordinator.append(*(event() for _ in range(5)))
        with psycopg.connect(world.postgres.dsn()) as connection:
            connection.execute("lock table audit.entries in share update exclusive mode")
            answer = await coordinator.append(*(event() for _ in range(8)))
            assert answer.placements[-1].index == 12
            assert partitions(world) == ["entries_0", "entries_8"]
        await coordinator.append(event())
    assert partitions(world) == ["entries_0", "entries_8", "entries_16"]


async def test_a_detached_partition_is_missed_by_no_proof(log: Archived) -> None:
    async with log.world.client(log.replica) as coordinator:
        old = open_checkpoint(await coordinator.checkpoint(), log.replica.verifier)
        log.allow()
        assert log.detach() == 3
        assert log.detach() == 0, "once"
        assert partitions(log.world) == ["entries_24", "entries_32"]
        known = await coordinator.append(*log.events)
        assert [item.index for item in known.placements] == list(range(29)), "an archived event is still in the log"
        changed = pb.Event()
        changed.CopyFrom(log.events[0])
        changed.body_json = "{}"
        with pytest.raises(FedmeshError) as caught:
            await coordinator.append(changed)
        assert caught.value.code is Code.REQUEST_ID_REUSED
        await coordinator.append(event())
        new = open_checkpoint(await coordinator.checkpoint(), log.replica.verifier)
        for index in range(new.size):
            size, leaf, hashes = await log.replica.log.inclusion(index, 0)
            verify_inclusion(leaf, index, size, hashes, new.root)
        for first in range(1, new.size + 1):
            _, hashes = await log.replica.log.consistency(first, 0)
            if first == old.size:
                verify_consistency(old.size, new.size, old.root, new.root, hashes)
        assert set(await log.hospitals.look(log.replica, spot_checks=100)) == {"cosigned"}, "no witness is alarmed"
    with pytest.raises(FedmeshError, match="entries 8 to 15 are in an archive") as caught:
        await log.replica.log.entry(AUDIT, 9, 0)
    assert (caught.value.code, caught.value.detail["online_from"]) == (Code.NOT_FOUND, "24")
    with pytest.raises(FedmeshError, match="entries 8 to 15 are in an archive"):
        [item async for item in log.replica.log.entries(9, 0)]


async def tell(log: Archived) -> list[dict[str, Any]]:
    """What the audit service appends of archives, having told it twice."""
    database = Database(log.world.postgres.config("audit_service"))
    await database.open()
    try:
        teller = ArchiveEvents(PostgresStore(database), log.replica.log, AUDIT)
        assert (await teller.tell(), await teller.tell()) == (3, 0)
    finally:
        await database.close()
    return [json.loads(leaf) async for _, leaf in log.replica.log.entries(len(log.events), 0)]


async def test_fsck_derives_the_tree_from_archives_and_database_and_the_log_tells_of_them(log: Archived) -> None:
    log.allow()
    log.detach()
    with_them = await log.check(log.folder)
    assert (with_them.wrong, with_them.entries, with_them.unread) == (0, 29, [])
    assert with_them.untold == [0, 8, 16]
    without = await log.check()
    assert (without.wrong, without.entries, without.nodes) == (0, 5, with_them.nodes), without.problems
    assert [item[:2] for item in without.unread] == [(0, 7), (8, 15), (16, 23)]
    for item, first in zip(await tell(log), (0, 8, 16), strict=True):
        proven = verify_archive(log.folder / Part(first, 3).folder, log.replica.verifier)
        body = item["body"]
        assert (item["type"], body["first"], body["last"]) == ("log.archived", first, first + 7)
        assert (body["root"], body["files"]) == (proven.root.hex(), json.loads(proven.manifest)["files"])
        assert (item["actor"], item["source"]) == ("postgresql/audit_migrator", str(AUDIT))
    after = await log.check(log.folder)
    assert (after.wrong, after.untold) == (0, [])
    damaged = log.folder / Part(8, 3).folder / export.ENTRIES
    damaged.write_bytes(damaged.read_bytes().replace(b"number", b"nunber", 1))
    problems = (await log.check(log.folder)).problems
    assert [problem[:34] for problem in problems] == ["entries 8 to 15: their archive: en"]
    with psycopg.connect(log.world.postgres.dsn()) as connection:
        for table in ("nodes", "archives"):
            connection.execute(f"alter table audit.{table} disable trigger append_only".encode())
        connection.execute("update audit.archives set root = sha256('x') where first_index = 8")
        connection.execute("update audit.nodes set hash = sha256('x') where level = 0 and position = 4")
    problems = (await log.check()).problems
    assert "entries 4 to 5: their subtree hash does not follow from their bodies" in problems
    assert "archive of entries 8 to 15: its root is not that of the tree" in problems
    assert "archive of entries 8 to 15: the log tells of another one" in problems


async def test_an_export_of_the_whole_log_takes_from_archives_what_is_there_alone(
    log: Archived, tmp_path: Path
) -> None:
    verifier = log.replica.verifier
    note = await log.replica.log.checkpoint()
    async with log.world.client(log.replica, "operator") as operator:
        await stream_export(operator.stub, tmp_path / "before", verifier, note, None)
        log.allow()
        log.detach()
        await stream_export(operator.stub, tmp_path / "after", verifier, note, log.folder)
        with pytest.raises(FedmeshError, match=r"entries 0 to 7 are in an archive since .* entries from 24 on"):
            await stream_export(operator.stub, tmp_path / "without", verifier, note, None)
    for name in export.FILES:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


async def test_the_commands_do_it(log: Archived, tmp_path: Path) -> None:
    """Against a database outside a stack."""
    (tmp_path / "log.vkey").write_text(f"{log.replica.verifier}\n")
    members = log.hospitals.keys.values()
    statement = found(CONSORTIUM, [keys.public() for keys in members])
    signatures = {keys.hospital_id: sign_roster(statement, keys) for keys in members}
    save_roster_file(tmp_path / "roster.json", statement, signatures)
    shutil.rmtree(log.folder)
    trust = ["--key", str(tmp_path / "log.vkey")]
    witnesses = ["--roster", str(tmp_path / "roster.json")]

    async def run(role: str, *arguments: str) -> str:
        config = log.world.postgres.config(role)
        (tmp_path / "db.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [*arguments, "--config", str(tmp_path / "db.yaml"), *trust]
        result = await asyncio.to_thread(CliRunner().invoke, app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    out = str(log.folder)
    said = await run("audit_service", "archive", out, "--older-than", "0", *witnesses)
    assert said.count("written and read back; keep until 20") == 3
    for part in (Part(0, 3), Part(8, 3), Part(16, 3)):
        checked = CliRunner().invoke(app, ["verify", str(log.folder / part.folder), *trust, *witnesses])
        assert checked.exit_code == 0, checked.output
        assert "by the key that you trust" in checked.output
        assert "The checkpoint is witnessed: 4 of 4" in checked.output
    log.allow()
    assert "3 partitions detached" in await run("audit_migrator", "archive", out, "--detach", *witnesses)
    assert "entries 8 to 15 are taken from the hashes" in await run("audit_service", "fsck")
    assert "29 entries" in await run("audit_service", "fsck", "--archives", out)


async def test_nothing_is_detached_that_is_young_damaged_or_not_witnessed(log: Archived) -> None:
    first = log.folder / Part(0, 3).folder
    with pytest.raises(FedmeshError, match="stay in the database for 24 months") as caught:
        log.detach()
    assert caught.value.code is Code.WRONG_STATE
    log.allow()
    whole = (first / export.ENTRIES).read_bytes()
    (first / export.ENTRIES).write_bytes(whole.replace(b"number", b"nunber", 1))
    with pytest.raises(FedmeshError) as caught:
        log.detach()
    assert caught.value.code is Code.PROOF_INVALID
    (first / export.ENTRIES).write_bytes(whole)
    keys = log.hospitals.keys
    log.hospitals.keys = {name: MemberKeys.generate(name) for name in keys}
    with pytest.raises(FedmeshError, match="its checkpoint is not witnessed: 0 of 4"):
        log.detach()
    log.hospitals.keys = keys
    with pytest.raises(FedmeshError) as caught:
        log.detach("audit_service")
    assert caught.value.code is Code.PERMISSION_DENIED
    for statement in (
        "set local role audit_owner",
        "select audit.detach_partition(0, sha256('x'), '')",
        "alter table audit.entries detach partition audit.entries_0",
        "drop table audit.entries_0",
        "insert into audit.archives select 0, sha256('x'), '', '', gen_random_uuid(), now()",
    ):
        with (
            psycopg.connect(log.world.postgres.dsn("audit_service")) as connection,
            pytest.raises(pg.InsufficientPrivilege),
        ):
            connection.execute(statement.encode())
    with psycopg.connect(log.world.postgres.dsn("audit_service")) as connection, pytest.raises(pg.DataException):
        connection.execute("select audit.make_partitions(10000000)")
    assert partitions(log.world)[0] == "entries_0"


async def test_archives_are_written_once_and_in_order(log: Archived) -> None:
    broken_off = (log.folder / Part(8, 3).folder).rename(log.folder / f".partial-{Part(8, 3).folder}")
    (broken_off / export.MANIFEST).unlink()
    kept = {path: path.stat().st_mtime_ns for path in log.folder.glob("entries-*/*")}
    assert await log.write() == 3
    assert not broken_off.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert await log.write(months=24) == 0, "all are younger"
    async with log.world.client(log.replica) as coordinator:
        await coordinator.append(*(event() for _ in range(8)))
    assert await log.write() == 3, "the fourth is full, and not witnessed"
    assert set(await log.hospitals.look(log.replica)) == {"cosigned"}
    assert await log.write() == 4
    log.allow()
    shutil.rmtree(log.folder / Part(0, 3).folder)
    assert log.detach() == 0, "the oldest goes first"


async def test_a_log_that_has_entries_becomes_the_first_partition(
    postgres: PostgresDatabase, tmp_path: Path, migrations: Path
) -> None:
    """Larger than a partition: it becomes one of twice the size, without being written again."""
    migrator = postgres.config("audit_migrator")
    migrate(migrator, "audit", narrow(tmp_path / "before", "0001", "0002"))
    ca = create_ca(tmp_path / "ca", CONSORTIUM)
    generate_key(tmp_path / "log.key", f"{CONSORTIUM}/audit")
    world = World(postgres, ca, tmp_path / "log.key", ca.issue_service("audit"))
    events = [read_event(event(number=number)) for number in range(13)]
    fill_as_the_release_before(world, [make_leaf(item, AUDIT) for item in events])
    query = "select pg_relation_filenode(%s)"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        before = connection.execute(query, ("audit.entries",)).fetchone()
        assert migrate(migrator, "audit", migrations) == ["0003_partitions"]
        assert connection.execute(query, ("audit.entries_0",)).fetchone() == before
    with pytest.raises(pg.UndefinedColumn):
        fill_as_the_release_before(world, [make_leaf(read_event(event()), AUDIT)])
    assert partitions(world) == ["entries_0", "entries_16"]
    async with world.replica() as replica:
        again = await replica.log.append(AUDIT, new_id(), [events[12], read_event(event()), events[3]])
        assert [placed.entry.index for placed in again.placed] == [12, 13, 3]
        async with world.client(replica) as coordinator:
            await coordinator.append(*(event() for _ in range(20)))
        report = await check_log(postgres.config("audit_service"), replica.verifier)
    assert (report.wrong, report.entries) == (0, 34), report.problems
    assert partitions(world)[:4] == ["entries_0", "entries_16", "entries_24", "entries_32"]


def fill_as_the_release_before(world: World, leaves: list[Leaf]) -> None:
    """One batch, by the statements of that release."""
    key = load_signing_key(world.key_file)
    frontier = Frontier()
    with psycopg.connect(world.postgres.dsn("audit_service")) as connection:
        for index, leaf in enumerate(leaves):
            digest = leaf_hash(leaf.content)
            connection.execute(
                "insert into audit.entries (index, event_id, leaf, leaf_hash, recorded_at)"
                " values (%s, %s, %s, %s, now())",
                (index, leaf.event_id, leaf.content, digest),
            )
            for node in frontier.append(digest)[1:]:
                connection.execute("insert into audit.nodes values (%s, %s, %s)", node)
        note = sign_checkpoint(Checkpoint(key.name, frontier.size, frontier.root()), key)
        row = (frontier.size, frontier.root(), note)
        connection.execute("insert into audit.checkpoints values (%s, %s, %s, now())", row)
