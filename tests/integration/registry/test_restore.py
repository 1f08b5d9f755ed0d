"""The restore drill (`make restore-drill`): PostgreSQL is lost and restored to a moment; what was lost is counted.

The centre cannot say what it lost: whatever said so is gone. Hospitals can, from their own disks: the checkpoint that
they hold, the ledger that they keep, the receipts that they took.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from fedmesh.registry.v1 import registry_pb2 as pb

from services.audit.fsck import Report, check_log
from services.cli.receipts import take, verify_file
from services.common.errors import FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.embedded.guard import Guard
from services.embedded.postgres import DATABASE, EmbeddedPostgres
from services.hospital_node.domain.witness_ports import RefusalKind
from services.hospital_node.store.witness import read_witness
from services.privacy.chain import Entry
from services.transparency.checkpoint import generate_key, load_signing_key
from tests.integration.registry.test_ledgers import chain, charged, report
from tests.support.backups import TOOLS, Backups, why_not
from tests.support.stores import PostgresDatabase

from .consortium import Consortium, running_consortium, save_founding_roster
from .harness import CONSORTIUM, HOSPITALS

pytestmark = pytest.mark.slow
WITNESS = HOSPITALS[1]


@dataclass(frozen=True)
class Site:
    """Where the drill takes place, and the tool that backs up and restores."""

    folder: Path
    backups: Backups

    def generation(self, name: str, before: str = "") -> Path:
        """A folder of the centre's and the hospitals' files: new ones, or those of another generation."""
        made = self.folder / name
        if before:
            shutil.copytree(self.folder / before, made, ignore=shutil.ignore_patterns("ca"))
        else:
            made.mkdir()
            save_founding_roster(made / "roster.json")
            generate_key(made / "log.key", f"{CONSORTIUM}/audit")
        return made


@dataclass(frozen=True)
class Witnessed:
    """What hospitals hold when the disaster comes. moment: what is restored; kept: entries of the log by then."""

    job_id: str
    moment: datetime
    kept: int
    held: int
    ledger: list[Entry]
    receipt: Path


@pytest.fixture(params=TOOLS, ids=lambda tool: tool.name)
def site(request: pytest.FixtureRequest, store_guard: Guard) -> Iterator[Site]:
    tool: type[Backups] = request.param
    if reason := why_not(tool):
        say(f"\nNOT PLAYED with {tool.name}: {reason}")
        pytest.skip(reason)
    # The servers' account comes by here, and the path is short enough for sockets.
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    folder.chmod(0o711)
    backups = tool(folder, store_guard)
    try:
        yield Site(folder, backups)
    finally:
        backups.close()
        shutil.rmtree(folder)


def say(text: str) -> None:
    """Print to the terminal even where what services log is captured (`--capture=sys`)."""
    print(text, file=sys.__stdout__, flush=True)


def held_by(consortium: Consortium, name: str = WITNESS) -> int:
    """Entries of the newest checkpoint that a hospital holds."""
    held, _ = read_witness(consortium.folder / name)
    return max(item.size for item in held.values())


async def live(site: Site, server: EmbeddedPostgres) -> Witnessed:
    """The days before: a backup after the first round; the moment after the second; a third one that will be lost."""
    async with running_consortium(PostgresDatabase(server, DATABASE), site.generation("before")) as consortium:
        registry = consortium.registry
        site.backups.first_backup(server)
        job = await registry.job(rounds=4)
        ledger = chain(job.job_id, 1)
        await registry.commit(job, 1)
        await report(registry, ledger)
        await consortium.witness(*HOSPITALS)
        said = site.backups.backup(server)
        say(f"  backup         after round 1, {held_by(consortium)} entries in the audit log: {said}")

        ledger.append(charged(ledger[-1].head, job.job_id, 2))
        await registry.commit(job, 2)
        await report(registry, ledger)
        await consortium.witness(*HOSPITALS)
        kept = held_by(consortium)
        with psycopg.connect(server.dsn()) as connection:
            row = connection.execute("select clock_timestamp()").fetchone()
        assert row is not None
        moment = row[0].astimezone(UTC)
        say(f"  the moment     {moment:%Y-%m-%d %H:%M:%S.%f} UTC, after round 2, {kept} entries")

        ledger.append(charged(ledger[-1].head, job.job_id, 3))
        await registry.commit(job, 3)
        await report(registry, ledger)
        await consortium.witness(*HOSPITALS)
        consortium.sent(WITNESS, job.job_id, 3, f"{WITNESS} 3".encode())
        receipt = site.folder / "receipt-of-round-3.json"
        await take(consortium.asker(WITNESS), job.job_id, 3, receipt)
        say(f"  afterwards     round 3, {held_by(consortium)} entries, witnessed by {len(HOSPITALS)} hospitals")
        site.backups.archive_all(server)
        return Witnessed(job.job_id, moment, kept, held_by(consortium), ledger, receipt)


async def count_losses(site: Site, server: EmbeddedPostgres, before: Witnessed) -> None:
    """The restored log is whole and shorter; hospitals refuse it, and know by how much."""
    database = PostgresDatabase(server, DATABASE)
    checked = await fsck(database, site.folder / "before")
    assert checked.wrong == 0, checked.problems
    assert checked.entries == before.kept
    say(
        f"  audit fsck     OK: {checked.entries} entries, {checked.checkpoints} checkpoints, all follow from the bodies"
    )

    async with running_consortium(database, site.generation("same-log", "before")) as consortium:
        assert await consortium.look(*HOSPITALS) == ["refused"] * len(HOSPITALS)
        (refusal,) = read_witness(consortium.folder / WITNESS)[1]
        assert refusal.kind is RefusalKind.ROLLBACK
        alarms = consortium.registry.sql("select hospital_id from audit.alarms where kind = 'rollback'")
        assert {row[0] for row in alarms} == set(HOSPITALS)
        say(f"  witnesses      ALARM rollback from {len(alarms)} of {len(HOSPITALS)} hospitals: {refusal.reason}")

        rounds = consortium.registry.sql("select max(version) from registry.rounds where job_id = %s", before.job_id)
        reported = consortium.registry.sql("select count(*) from registry.ledger_entries")
        assert rounds == [(2,)]
        assert reported == [(len(before.ledger) - 1,)]
        asker = consortium.asker(WITNESS)
        proven = verify_file(before.receipt, asker.verifier, asker.config.roster).counted.version
        say("\nLOST, by what hospitals hold:")
        say(f"  audit entries  {before.held - checked.entries}  (checkpoint of {before.held}, {checked.entries} left)")
        say(f"  rounds         {proven - rounds[0][0]}  (a receipt proves round {proven}, offline, under the old key)")
        lost = len(before.ledger) - reported[0][0]
        say(f"  ledger entries {lost}  ({HOSPITALS[0]} has {len(before.ledger)} in its own)")
        assert (proven, before.held > checked.entries) == (3, True)


async def go_on(site: Site, server: EmbeddedPostgres, before: Witnessed) -> None:
    """The old log has ended. A new one under a new key; the job ends; hospitals report their ledgers again."""
    folder = site.generation("new-log", "same-log")
    (folder / "log.key").unlink()
    generate_key(folder / "log.key", f"{CONSORTIUM}/audit")
    server.create_database("log_2")
    database, new_log = PostgresDatabase(server, DATABASE), PostgresDatabase(server, "log_2")
    async with running_consortium(database, folder, new_log) as consortium:
        ending = pb.EndJobRequest(request_id=new_id(), job_id=before.job_id, status=pb.JOB_STATUS_FAILED, reason="lost")
        await call(consortium.registry.service().EndJob, ending)
        answer = await report(consortium.registry, before.ledger)
        assert (answer.head.seq, answer.head.sha256, answer.differs) == (
            len(before.ledger),
            before.ledger[-1].sha256,
            False,
        )
        say("\nBROUGHT BACK:")
        say(f"  ledger         {HOSPITALS[0]} reported again: the registry has all {answer.head.seq} entries")
        await consortium.witness(*HOSPITALS)
        checked = await fsck(new_log, folder)
        assert (checked.wrong, checked.cosignatures) == (0, len(HOSPITALS))
        say(
            f"  audit log      a new one, new key: {checked.entries} entries, {checked.cosignatures} hospitals cosigned"
        )
        say("  not brought    the model of round 3: its job is ended, start another one")


async def fsck(database: PostgresDatabase, folder: Path) -> Report:
    return await check_log(database.config("audit_service"), load_signing_key(folder / "log.key").verifier)


async def test_restore_drill(site: Site) -> None:
    primary = site.backups.start_primary()
    version = primary.status().version
    say(f"\nRESTORE DRILL, PostgreSQL {version}, {site.backups.name}\nBefore:")
    before = await live(site, primary)
    primary.kill()
    primary.destroy()
    assert not primary.data_dir.exists()
    say("  DISASTER       the server is killed, its disk is gone; backup and WAL archive are left")

    started = time.monotonic()
    restored = site.backups.restore(before.moment)
    restored.start()
    say(f"\nRestored to the moment in {time.monotonic() - started:.1f} s:")
    await count_losses(site, restored, before)
    await go_on(site, restored, before)


async def test_an_archive_that_ends_too_early_opens_nothing(site: Site) -> None:
    primary = site.backups.start_primary()
    site.backups.first_backup(primary)
    site.backups.backup(primary)
    site.backups.archive_all(primary)
    primary.destroy()
    restored = site.backups.restore(datetime.now(UTC) + timedelta(days=1))
    with pytest.raises(FedmeshError):
        restored.start()
    assert "recovery ended before configured recovery target was reached" in restored.log.read_text()
    with pytest.raises(FedmeshError):
        site.backups.restore(datetime.now(UTC))
