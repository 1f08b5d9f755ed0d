"""Somebody with all rights on the database changes the log: who notices."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from services.audit.fsck import Report, check_log
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.witness_ports import RefusalKind
from services.hospital_node.store.witness import read_witness
from services.transparency import export
from services.transparency.canonical import canonical_json
from services.transparency.checkpoint import (
    Checkpoint,
    SigningKey,
    generate_key,
    load_signing_key,
    open_checkpoint,
    sign_checkpoint,
)
from services.transparency.merkle import leaf_hash, tree_root
from services.transparency.verify import verify_export

from .conftest import Replica, World, event
from .hospitals import Hospitals

SIZE = 13


@pytest.fixture
def hospitals(world: World, tmp_path: Path) -> Hospitals:
    return Hospitals(world, tmp_path)


class Intruder:
    """A superuser who has switched every safeguard off."""

    def __init__(self, world: World, key: SigningKey) -> None:
        self.world = world
        self.key = key
        for table in ("entries", "entries_0", "events", "nodes", "checkpoints", "cosignatures"):
            self.run(f"alter table audit.{table} disable trigger append_only")
        self.run("alter table audit.entries drop constraint entries_check")

    def run(self, *statements: str) -> None:
        with psycopg.connect(self.world.postgres.dsn()) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def edit(self) -> None:
        self.run("update audit.entries set leaf = overlay(leaf placing '\\x22' from 3) where index = 5")

    def edit_with_hash(self) -> None:
        self.edit()
        self.run("update audit.entries set leaf_hash = sha256('\\x00'::bytea || leaf) where index = 5")

    def delete(self) -> None:
        self.run("delete from audit.entries where index = 5")

    def reorder(self) -> None:
        for before, after in ((5, 1000), (6, 5), (1000, 6)):
            self.run(f"update audit.entries set index = {after} where index = {before}")

    def append(self) -> None:
        """A row, and a checkpoint over it that another key signed: without one nobody would be shown the row."""
        self.append_row()
        with psycopg.connect(self.world.postgres.dsn(), row_factory=dict_row) as connection:
            rows = connection.execute("select leaf from audit.entries order by index").fetchall()
            root = tree_root(leaf_hash(row["leaf"]) for row in rows)
            note = sign_checkpoint(Checkpoint(self.key.name, SIZE + 1, root), self.key)
            connection.execute("insert into audit.checkpoints values (%s, %s, %s, now())", (SIZE + 1, root, note))
            connection.execute(
                "insert into audit.nodes values (1, 6, sha256('\\x01'::bytea ||"
                " (select leaf_hash from audit.entries where index = 12) ||"
                " (select leaf_hash from audit.entries where index = 13)))"
            )

    def append_row(self) -> None:
        self.run("insert into audit.entries select 13, leaf, leaf_hash, now() from audit.entries where index = 0")


@pytest.fixture
async def intruder(world: World, replica: Replica, hospitals: Hospitals) -> Intruder:
    """A log of some entries under two checkpoints, which all hospitals have witnessed; and somebody who wants to."""
    async with world.client(replica) as coordinator:
        await coordinator.append(*(event(number=number) for number in range(7)))
        await coordinator.append(*(event(number=number) for number in range(7, SIZE)))
    assert set(await hospitals.look(replica, spot_checks=100)) == {"cosigned"}
    assert (await check(world, replica)).wrong == 0
    plain_export(world, hospitals.folder / "before", replica)
    assert verify_export(hospitals.folder / "before", replica.verifier).size == SIZE
    generate_key(hospitals.folder / "forger.key", replica.verifier.name)
    return Intruder(world, load_signing_key(hospitals.folder / "forger.key"))


async def check(world: World, replica: Replica) -> Report:
    return await check_log(world.postgres.config("audit_service"), replica.verifier)


def plain_export(world: World, folder: Path, replica: Replica) -> None:
    """What is stored, written out by somebody who checks nothing and makes every digest fit."""
    with psycopg.connect(world.postgres.dsn(), row_factory=dict_row) as connection:
        rows = connection.execute("select index, leaf from audit.entries order by index").fetchall()
        signed = connection.execute("select note from audit.checkpoints order by size desc limit 1").fetchone()
    assert signed is not None
    folder.mkdir()
    lines = b"".join(export.entry_line(number, row["leaf"]) for number, row in enumerate(rows))
    (folder / export.ENTRIES).write_bytes(lines)
    (folder / export.CHECKPOINT).write_text(signed["note"])
    (folder / export.KEY).write_text(f"{replica.verifier}\n")
    facts = signed["note"].split("\n")
    listed = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in export.file_digests(folder).items()}
    manifest = {"files": listed, "format": export.FORMAT, "origin": facts[0], "size": int(facts[1])}
    root = tree_root(leaf_hash(row["leaf"]) for row in rows).hex()
    (folder / export.MANIFEST).write_bytes(canonical_json({**manifest, "root": root}) + b"\n")


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (Intruder.edit, "entry 5: its body"),
        (Intruder.edit_with_hash, "entries 4 to 5: their subtree hash does not follow"),
        (Intruder.delete, "entry 5 is missing"),
        (Intruder.reorder, "entries 4 to 5: their subtree hash does not follow"),
        (Intruder.append, "checkpoint over 14 entries: the note is not signed by"),
    ],
)
async def test_every_change_is_noticed_by_everybody(
    world: World,
    replica: Replica,
    hospitals: Hospitals,
    intruder: Intruder,
    tmp_path: Path,
    attack: Callable[[Intruder], None],
    named: str,
) -> None:
    attack(intruder)
    report = await check(world, replica)
    assert report.wrong, "fsck"
    assert any(named in problem for problem in report.problems), report.problems
    plain_export(world, tmp_path / "export", replica)
    with pytest.raises(FedmeshError) as caught:
        verify_export(tmp_path / "export", replica.verifier)
    assert caught.value.code is Code.PROOF_INVALID, "the offline verifier"
    assert await hospitals.look(replica, spot_checks=100) == ["refused"] * 4, "every witness"


async def test_fsck_names_whatever_was_changed(world: World, replica: Replica, intruder: Intruder) -> None:
    changes = {
        "update audit.nodes set hash = sha256('x') where level = 2 and position = 1": "entries 4 to 7: their subtree",
        "delete from audit.nodes where level = 3": "entries 0 to 7: their subtree hash is missing",
        "insert into audit.nodes values (1, 6, sha256('x'))": "level 1, position 6: there are no such entries",
        "update audit.checkpoints set root = sha256('x') where size = 7": "over 7 entries: its root does not follow",
        "update audit.checkpoints set note = note || note where size = 13": "over 13 entries: ",
        "update audit.entries set leaf = '\\x7b7d' where index = 3": "entry 3: its body names no event",
        "update audit.events set index = 2 where index = 4": "entry 4: the log does not know its event as this entry",
        "insert into audit.events values (gen_random_uuid(), 1)": "audit.events has 14 rows, of which 13 belong there",
        "insert into audit.checkpoints select 5, root, note, now() from audit.checkpoints where size = 7": "over 5 ",
        "insert into audit.nodes values (-1, 1, sha256('x'))": "audit.nodes has 11 rows, of which 10 belong there",
        "update audit.cosignatures set public_key = sha256('x') where hospital_id = 'west'": "of west over 13",
        "update audit.cosignatures set size = 12 where hospital_id = 'east'": "over 12 entries: there is no such",
    }
    intruder.run("alter table audit.nodes drop constraint nodes_level_check", *changes)
    report = await check(world, replica)
    for named in changes.values():
        assert any(named in problem for problem in report.problems), (named, report.problems)


async def test_fsck_notices_an_end_that_was_cut_off(world: World, replica: Replica, intruder: Intruder) -> None:
    for statement, named in (
        ("delete from audit.entries where index >= 10", "checkpoint over 13 entries: there are only 10"),
        ("delete from audit.checkpoints where size = 13", "entries 7 to 9 are under no checkpoint"),
    ):
        intruder.run(statement)
        report = await check(world, replica)
        assert any(named in problem for problem in report.problems), report.problems


async def test_a_row_that_nobody_signed_is_shown_to_nobody(world: World, replica: Replica, intruder: Intruder) -> None:
    intruder.append_row()
    report = await check(world, replica)
    assert "entries 13 to 13 are under no checkpoint: the log did not append them" in report.problems
    assert open_checkpoint(await replica.log.checkpoint(), replica.verifier).size == SIZE
    with pytest.raises(FedmeshError) as caught:
        await replica.log.inclusion(SIZE, 0)
    assert caught.value.code is Code.NOT_FOUND
    async with world.client(replica) as coordinator:
        with pytest.raises(FedmeshError):
            await coordinator.append(event())
    assert await check(world, replica) == report, "and the log signs nothing on top of it"


async def test_a_history_rewritten_through_the_service_is_caught_by_who_remembers(
    world: World, replica: Replica, hospitals: Hospitals, intruder: Intruder
) -> None:
    """The end is cut off, and the service, which keeps no memory of its own, signs another one.

    The result is a log without a flaw, signed by its own key: only a witness can tell that it is not the one from
    before, and no quorum will cosign it.
    """
    intruder.run(
        "delete from audit.entries where index >= 7",
        "delete from audit.events where index >= 7",
        "delete from audit.checkpoints where size > 7",
        "delete from audit.cosignatures",
        "delete from audit.nodes where (position + 1) * 2 ^ level > 7",
    )
    async with world.client(replica) as coordinator:
        await coordinator.append(*(event(other=number) for number in range(9)))
    assert (await check(world, replica)).wrong == 0
    assert await hospitals.look(replica) == ["refused"] * 4
    intruder.run("truncate audit.entries, audit.events, audit.nodes, audit.checkpoints, audit.cosignatures")
    assert await hospitals.look(replica) == ["refused"] * 4, "an empty log is no fresh start"
    kinds = [refusal.kind for refusal in read_witness(hospitals.folder / "north")[1]]
    assert kinds == [RefusalKind.FORK, RefusalKind.ROLLBACK]
