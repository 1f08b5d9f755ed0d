"""A ledger that was lost and is built again from what was reported: nothing is ever spent twice."""

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.cli.reconciliation import rows_of
from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import LedgerStanding, Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import LEDGER_FILE, SqliteLedger, read_entries, read_ledger
from services.hospital_node.store.ledger_chain import HEAD_FILE
from services.hospital_node.store.ledger_recovery import SqliteLostLedger
from services.hospital_node.usecases.recovering import (
    Reported,
    finish,
    newest_told,
    read_copy,
    recover,
    require_meant,
    what_is_unknown,
)
from services.privacy.approval import ApproverKey, add_signature
from services.privacy.budget import Limit
from services.privacy.chain import Entry, Head
from services.privacy.recovery import (
    ALL_SPENT,
    NOTHING_UNREPORTED,
    Basis,
    Recovery,
    RecoveryApproval,
    approved_recovery,
    read_recovery_approval,
)
from services.registry.domain.entities import LedgerReport
from services.registry.domain.ledger import continuation
from services.secure_sum.roster import MemberKeys

NORTH, OTHER = MemberKeys.generate("north"), MemberKeys.generate("other")
OWN_KEY = NORTH.public().signing_key
LIMIT = Limit(0.5, 1e-5)
LOST_AT = datetime(2026, 6, 1, tzinfo=UTC)
PEOPLE = [ApproverKey(name, Ed25519PrivateKey.generate()) for name in ("admin", "second")]
APPROVERS = {key.name: key.public for key in PEOPLE}


def reservation(job: str, epsilon: float = 0.1) -> Reservation:
    return Reservation(job, "a" * 64, "north-ward", True, epsilon, 1e-6, 4, 3, 2, ("h1", "h2"), "d" * 64)


def opened(folder: Path, clock: FakeClock, limit: Limit = LIMIT) -> SqliteLedger:
    return SqliteLedger(folder, clock, limit)


@dataclass
class Copy:
    """The registry's copy, kept by the registry's own rule."""

    entries: list[Entry] = field(default_factory=list)
    signature: bytes = b""
    page: int = 2
    told: int = 0

    async def head(self) -> tuple[LedgerStanding, int]:
        return LedgerStanding(self._head(), self.signature, differs=False), 0

    async def entries_after(self, seq: int) -> Sequence[Entry]:
        return self.entries[seq : seq + self.page]

    async def report(self, head: Head, signature: bytes, entries: Sequence[Entry]) -> LedgerStanding:
        assert head.signed_by("north", OWN_KEY, signature)
        known = {entry.seq: entry.sha256 for entry in self.entries}
        fresh = continuation(LedgerReport("north", head, signature, tuple(entries)), self._head(), known)
        if fresh:
            self.entries, self.signature = [*self.entries, *fresh], signature
            self.told += 1
        return LedgerStanding(self._head(), self.signature, differs=fresh is None)

    def _head(self) -> Head:
        return self.entries[-1].head if self.entries else Head()

    def keep(self, entries: Sequence[Entry], keys: MemberKeys = NORTH) -> None:
        self.entries = list(entries)
        self.signature = keys.signing.sign(entries[-1].head.to_sign("north"))


class Hospital:
    """A node's folder with a ledger: a job that was charged, one that is open, one that was released; all of it
    reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "node"
        self.folder.mkdir()
        self.clock = FakeClock(LOST_AT - timedelta(days=300))
        self.copy = Copy()
        ledger = opened(self.folder, self.clock)
        for job in ("used", "open", "unused"):
            ledger.reserve(reservation(job))
        ledger.charge(AttemptId("used", 1, 1), measured=False)
        ledger.release("unused")
        self.clock.advance(timedelta(days=300).total_seconds())
        self.copy.keep(read_entries(self.folder))

    def lose(self, *names: str) -> None:
        """The files are gone; both of the ledger, unless they are named."""
        for name in names or (LEDGER_FILE, HEAD_FILE):
            for path in self.folder.glob(f"{name}*"):
                path.unlink()

    @property
    def place(self) -> SqliteLostLedger:
        return SqliteLostLedger(self.folder)

    def reported(self, *keys: str) -> Reported:
        return asyncio.run(read_copy(self.copy, "north", keys or (OWN_KEY,)))

    def recover(self, recovery: Recovery = ALL_SPENT) -> SqliteLedger:
        asyncio.run(recover(self.place, self.copy, NORTH, self.reported(), recovery, self.clock.now()))
        return opened(self.folder, self.clock)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


def refused(function: Callable[..., Any], *arguments: Any, **named: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        function(*arguments, **named)
    return caught.value


def test_what_nobody_knows_counts_as_everything_under_any_limit(hospital: Hospital) -> None:
    hospital.lose()
    ledger = hospital.recover()
    assert ledger.left("north-ward") == ledger.left("another-ward") == 0
    richer = opened(hospital.folder, hospital.clock, Limit(100.0, 0.9))
    assert refused(richer.reserve, reservation("new")).code is Code.BUDGET_EXHAUSTED
    # The registry has it, signed, and the chain goes on from what was reported.
    assert hospital.copy.entries == read_entries(hospital.folder)
    said = hospital.copy.entries[-1].read()
    assert (said["kind"], said["basis"], said["epsilon"], said["delta"]) == ("recovered", "all-spent", 100.0, 1.0)
    hospital.clock.advance(timedelta(days=366).total_seconds())
    assert ledger.left("north-ward") == 0.5
    ledger.reserve(reservation("next year", 0.5))


def test_jobs_from_before_go_no_further_and_count_from_the_recovery_on(hospital: Hospital) -> None:
    hospital.lose()
    ledger = hospital.recover(Recovery(Basis.APPROVED, 0.0, 0.0))
    # `used` was charged 300 days before and would have left the window soon; `open` may have been charged, unreported.
    assert ledger.left("north-ward") == pytest.approx(0.3)
    hospital.clock.advance(timedelta(days=300).total_seconds())
    assert ledger.left("north-ward") == pytest.approx(0.3)
    assert ledger.unused() == []
    for job in ("used", "open", "unused"):
        assert not ledger.release(job)
        error = refused(ledger.reserve, reservation(job))
        assert (error.code, "lost and recovered" in error.message) == (Code.PRIVACY_REFUSED, True)
        for ask in (ledger.require_room, ledger.charge):
            assert refused(ask, AttemptId(job, 1, 1), measured=False).code is Code.PRIVACY_REFUSED
    ledger.reserve(reservation("new"))
    ledger.charge(AttemptId("new", 1, 1), measured=False)
    assert opened(hospital.folder, hospital.clock).left("north-ward") == pytest.approx(0.2)
    assert set(rows_of(read_entries(hospital.folder))) == set(read_ledger(hospital.folder))


def test_a_ledger_that_was_lost_twice(hospital: Hospital) -> None:
    for _ in range(2):
        hospital.lose()
        ledger = hospital.recover(Recovery(Basis.APPROVED, 0.1, 0.0))
    assert ledger.left("north-ward") == pytest.approx(0.1)
    assert [entry.read()["kind"] for entry in read_entries(hospital.folder)][-2:] == ["recovered", "recovered"]


def test_a_hospital_that_had_reported_nothing(hospital: Hospital) -> None:
    hospital.lose()
    hospital.copy = Copy()
    assert hospital.recover().left("north-ward") == 0
    assert len(hospital.copy.entries) == 1


def test_two_people_can_say_that_nothing_was_ever_spent(hospital: Hospital) -> None:
    """As of a member that got other keys before its first job: its ledger is empty, and the log tells of none."""
    hospital.lose()
    hospital.copy = Copy()
    said = Recovery(Basis.APPROVED, 0.0, 0.0)
    assert what_is_unknown(hospital.reported(), Head(), newest_told([], "north"), said) is said
    assert hospital.recover(said).left("north-ward") == 0.5


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE recoveries SET epsilon = 0",
        "DELETE FROM recoveries",
        "UPDATE reservations SET recovered_at = NULL WHERE job_id = 'open'",
        "UPDATE reservations SET recovered_at = '2020-01-01T00:00:00+00:00'",
    ],
)
def test_a_recovery_that_was_altered_is_noticed(hospital: Hospital, change: str) -> None:
    hospital.lose()
    hospital.recover()
    with sqlite3.connect(hospital.folder / LEDGER_FILE) as connection:
        assert connection.execute(change).rowcount
    connection.close()
    assert refused(opened, hospital.folder, hospital.clock).code is Code.CONFIG_INVALID


def test_nothing_is_recovered_over_a_ledger_that_is_there(hospital: Hospital, tmp_path: Path) -> None:
    backup = shutil.copytree(hospital.folder, tmp_path / "backup")
    whole = refused(hospital.recover)
    assert (whole.code, "5 entries" in whole.message) == (Code.WRONG_STATE, True)
    hospital.lose(LEDGER_FILE)
    (hospital.folder / LEDGER_FILE).write_bytes(b"a damaged file" * 1000)
    damaged = refused(hospital.recover)
    assert (damaged.code, "cannot be read" in damaged.message) == (Code.WRONG_STATE, True)
    assert hospital.copy.told == 0
    # An old copy of both files, put back after the recovery, is found out by the registry's head.
    hospital.lose()
    hospital.recover()
    newest = hospital.copy.entries[-1].head
    assert not opened(Path(backup), hospital.clock).has(newest)
    # And one of the ledger alone by the second file.
    hospital.lose(LEDGER_FILE)
    shutil.copy(Path(backup) / LEDGER_FILE, hospital.folder)
    assert refused(opened, hospital.folder, hospital.clock).code is Code.CONFIG_INVALID


def test_an_empty_ledger_that_a_node_made_since_is_none(hospital: Hospital) -> None:
    hospital.lose()
    opened(hospital.folder, hospital.clock)
    assert hospital.recover().left("north-ward") == 0


def test_a_copy_that_is_forged_or_cut_is_refused(hospital: Hospital) -> None:
    entries = list(hospital.copy.entries)
    for forge in (
        lambda copy: copy.keep(entries, OTHER),
        lambda copy: setattr(copy, "entries", [*entries[:-2], entries[-1]]),
        lambda copy: setattr(copy, "entries", [*entries[:2], replace(entries[2], body=entries[1].body), *entries[3:]]),
    ):
        hospital.copy.keep(entries)
        forge(hospital.copy)
        error = refused(hospital.reported)
        assert error.code is Code.PROOF_INVALID
        assert "not to be used" in error.message
    # A former key of the hospital's own counts.
    hospital.copy.keep(entries, OTHER)
    assert hospital.reported(OWN_KEY, OTHER.public().signing_key).head == entries[-1].head


def test_a_copy_that_ends_early_is_found_out_by_the_log(hospital: Hospital) -> None:
    entries = list(hospital.copy.entries)
    told = [leaf("ledger.reported", entries[1].head), leaf("ledger.reported", entries[-1].head)]
    assert newest_told([*told, leaf("ledger.reported", Head(9, "b" * 64), of="south")], "north") == entries[-1].head
    # Everything about it is signed by the hospital: it is what it had reported some days before.
    hospital.copy.keep(entries[:2])
    older = hospital.reported()
    error = refused(what_is_unknown, older, Head(), newest_told(told, "north"), None)
    assert (error.code, "audit log tells of entry 5" in error.message) == (Code.PROOF_INVALID, True)
    hospital.copy.keep(entries)
    whole = hospital.reported()
    assert what_is_unknown(whole, Head(), newest_told(told, "north"), None) is ALL_SPENT
    assert refused(what_is_unknown, whole, Head(), entries[1].head, None).code is Code.WRONG_STATE
    other = Head(5, "b" * 64)
    assert refused(what_is_unknown, whole, Head(), other, None).code is Code.PROOF_INVALID
    assert refused(what_is_unknown, whole, Head(3, "b" * 64), None, None).code is Code.PROOF_INVALID


def leaf(kind: str, head: Head, of: str = "north") -> dict[str, Any]:
    return {"type": kind, "subject": f"hospital/{of}", "body": {"seq": head.seq, "sha256": head.sha256}}


def test_less_than_everything_needs_the_log_and_the_second_file_or_two_people(hospital: Hospital) -> None:
    hospital.lose(LEDGER_FILE)
    whole, kept = hospital.reported(), hospital.place.kept_head()
    assert kept == whole.head
    assert what_is_unknown(whole, kept, None, None) is ALL_SPENT
    assert what_is_unknown(whole, kept, whole.head, None) is NOTHING_UNREPORTED
    # The second file names an entry that was never reported.
    assert what_is_unknown(whole, Head(6, "b" * 64), whole.head, None) is ALL_SPENT
    said = Recovery(Basis.APPROVED, 0.1, 0.0)
    assert what_is_unknown(whole, Head(), whole.head, said) is said
    assert refused(what_is_unknown, whole, Head(), None, said).code is Code.CONFIG_INVALID
    assert refused(require_meant, ALL_SPENT, all_spent=False).code is Code.CONFIG_INVALID
    require_meant(ALL_SPENT, all_spent=True)
    require_meant(said, all_spent=False)
    assert hospital.recover(NOTHING_UNREPORTED).left("north-ward") == pytest.approx(0.3)


def test_two_people_approve_one_recovery_of_one_hospital(hospital: Hospital, tmp_path: Path) -> None:
    head, path = hospital.reported().head, tmp_path / "approval"
    approval = RecoveryApproval("north", head.seq, head.sha256, 0.2, 1e-6)
    add_signature(path, approval, PEOPLE[0], read_recovery_approval)
    assert "2 of privacy.approvers" in refused(approved_recovery, path, "north", head, APPROVERS).message
    add_signature(path, approval, PEOPLE[1], read_recovery_approval)
    assert approved_recovery(path, "north", head, APPROVERS) == Recovery(Basis.APPROVED, 0.2, 1e-6)
    for hospital_id, at in (("south", head), ("north", Head(head.seq, "b" * 64)), ("north", Head(9, head.sha256))):
        assert "something else" in refused(approved_recovery, path, hospital_id, at, APPROVERS).message
    path.write_text(path.read_text().replace("0.2", "-0.2"))
    assert "no approval" in refused(approved_recovery, path, "north", head, APPROVERS).message


def test_of_two_nodes_that_go_on_from_one_copy_the_registry_takes_one(hospital: Hospital) -> None:
    running = opened(hospital.folder, hospital.clock)
    seen = hospital.reported()
    running.charge(AttemptId("open", 1, 1), measured=False)
    hospital.copy.keep([*hospital.copy.entries, *running.entries_after(5, 10)])
    elsewhere = hospital.folder.parent / "elsewhere"
    elsewhere.mkdir()
    place = SqliteLostLedger(elsewhere)
    error = refused(asyncio.run, recover(place, hospital.copy, NORTH, seen, ALL_SPENT, hospital.clock.now()))
    assert (error.code, "from another node" in error.message) == (Code.WRONG_STATE, True)
    assert not (elsewhere / LEDGER_FILE).exists()
    # The other way round: what runs on after a recovery elsewhere has another entry at that place.
    asyncio.run(recover(place, hospital.copy, NORTH, hospital.reported(), ALL_SPENT, hospital.clock.now()))
    running.charge(AttemptId("open", 1, 2), measured=False)
    assert not running.has(hospital.copy.entries[-1].head)


def test_a_recovery_that_was_interrupted_is_finished_and_not_made_again(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital.lose()

    def killed(_place: SqliteLostLedger) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(SqliteLostLedger, "install", killed)
        with pytest.raises(KeyboardInterrupt):
            hospital.recover()
    assert hospital.copy.told == 1
    assert not (hospital.folder / LEDGER_FILE).exists()
    assert refused(finish, hospital.place, hospital.reported(), write=False).code is Code.WRONG_STATE
    done = finish(hospital.place, hospital.reported(), write=True)
    assert done == hospital.copy.entries[-1]
    assert opened(hospital.folder, hospital.clock).head() == done.head
    # What was built and never told is thrown away.
    hospital.lose()
    hospital.place.build(hospital.reported().entries, ALL_SPENT, hospital.clock.now())
    assert finish(hospital.place, hospital.reported(), write=True) is None
