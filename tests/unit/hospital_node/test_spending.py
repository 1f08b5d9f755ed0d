"""When a node believes that its ledger is whole, also after this hospital got other keys."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import LedgerStanding, Reservation, RosterFacts
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import SqliteLedger, read_entries
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.usecases.rosters import Rosters
from services.hospital_node.usecases.spending import Spending
from services.privacy.budget import Limit
from services.privacy.chain import RELEASED, Entry, Head, next_entry
from services.registry.domain.entities import LedgerReport
from services.registry.domain.ledger import continuation
from services.secure_sum.roster import MemberKeys, Roster, verify_successor
from tests.support import rosters
from tests.support.secure_sum import make_roster

NAMES = ("h1", "h2", "h3", "h4")
KEYS = {name: MemberKeys.generate(name) for name in NAMES}
OLD, NEW = KEYS["h1"], MemberKeys.generate("h1")
PATIENCE_S = 0.1
MADE_UP = next_entry(Head(), RELEASED, "2026-01-01T00:00:00+00:00", job_id="none")


def founded(*names: str) -> Roster:
    return make_roster([KEYS[name] for name in names])


def following(before: Roster, *members: MemberKeys) -> RosterFacts:
    """The roster of these members, signed by all of the one before but h1, whose keys may be lost."""
    return rosters.following(before, members, [KEYS[name] for name in before.ids if name != "h1"])


OTHERS = tuple(KEYS[name] for name in NAMES[1:])
FOUNDING = founded(*NAMES)
REPLACED = following(FOUNDING, NEW, *OTHERS)


class Registry:
    """The registry's rosters and its copy of h1's ledger, kept by the registry's own rule."""

    def __init__(self) -> None:
        self.rosters: list[RosterFacts] = []
        self.entries: list[Entry] = []
        self.signature = b""
        self.differences: list[Head] = []
        self.away = False

    async def list_rosters(self, after_version: int, _patience_s: float) -> list[RosterFacts]:
        self._answer()
        return self.rosters[after_version - 1 :]

    async def reported_ledger(self, _patience_s: float) -> LedgerStanding:
        self._answer()
        return LedgerStanding(self._head(), self.signature)

    async def report_ledger(
        self, head: Head, signature: bytes, entries: Sequence[Entry], _patience_s: float
    ) -> LedgerStanding:
        self._answer()
        known = {entry.seq: entry.sha256 for entry in self.entries}
        fresh = continuation(LedgerReport("h1", head, signature, tuple(entries)), self._head(), known)
        if fresh is None:
            self.differences.append(head)
        if fresh:
            self.entries, self.signature = [*self.entries, *fresh], signature
        return LedgerStanding(self._head(), self.signature, differs=fresh is None)

    def keep(self, entries: Sequence[Entry], signer: MemberKeys) -> None:
        self.entries = list(entries)
        self.signature = signer.signing.sign(entries[-1].head.to_sign("h1"))

    def _head(self) -> Head:
        return self.entries[-1].head if self.entries else Head()

    def _answer(self) -> None:
        if self.away:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "away")


class Node:
    """What of h1's node decides whether anything is spent, in a folder."""

    def __init__(self, folder: Path, registry: Registry, keys: MemberKeys, founding: Roster = FOUNDING) -> None:
        folder.mkdir(exist_ok=True)
        mesh: Any = registry
        self.ledger = SqliteLedger(folder, FakeClock(), Limit())
        self.rosters = Rosters(founding, SqliteNodeState(folder), mesh)
        self.spending = Spending(keys, self.rosters, self.ledger, mesh)

    def require_same(self) -> None:
        asyncio.run(self.spending.require_same(PATIENCE_S))

    def refusal(self) -> FedmeshError:
        with pytest.raises(FedmeshError) as caught:
            self.require_same()
        return caught.value

    def spend(self, job: str) -> None:
        self.ledger.reserve(Reservation(job, "a" * 64, "ward", True, 0.1, 1e-6, 1, 3, 2, NAMES, "d" * 64))
        self.ledger.charge(AttemptId(job, 1, 1), measured=False)


def spent(folder: Path, jobs: int = 2) -> list[Entry]:
    """The entries of a ledger with jobs that were charged: two a job."""
    node = Node(folder, Registry(), OLD)
    for number in range(jobs):
        node.spend(f"job {number}")
    return read_entries(folder)


def differing() -> float | None:
    return REGISTRY.get_sample_value("fedmesh_hospital_ledger_differs")


@pytest.mark.parametrize("founder", [True, False])
def test_a_new_hospital_that_the_registry_has_no_ledger_of_spends(tmp_path: Path, founder: bool) -> None:
    registry, before = Registry(), founded(*NAMES[1:])
    registry.rosters = [] if founder else [following(before, OLD, *OTHERS)]
    node = Node(tmp_path, registry, OLD, FOUNDING if founder else before)
    node.require_same()
    node.spend("first")
    asyncio.run(node.spending.report(PATIENCE_S))
    assert registry.entries == read_entries(tmp_path)
    assert (differing(), registry.differences) == (0, [])


@pytest.mark.parametrize("shown", ["the copy", "nothing", "what it made up"])
def test_an_empty_ledger_under_new_keys_spends_nothing_whatever_the_registry_shows(tmp_path: Path, shown: str) -> None:
    registry = Registry()
    registry.rosters = [REPLACED]
    if shown == "the copy":
        registry.keep(spent(tmp_path / "lost"), OLD)
    elif shown == "what it made up":
        registry.keep([MADE_UP], KEYS["h2"])
    node = Node(tmp_path / "node", registry, NEW)
    error = node.refusal()
    assert error.code is Code.CONFIG_INVALID
    for text in ("it was a member before", "roster version 1 lists h1", OLD.public().signing_key[:16], "LedgerLost.md"):
        assert text in error.message
    assert differing() == 1
    # The registry is told, and so has it in the audit log, unless it claims to know nothing.
    assert registry.differences == ([] if shown == "nothing" else [Head()])
    registry.entries, registry.signature = [], b""
    assert node.refusal() is error, "until the node is started again"


def test_an_older_copy_under_new_keys_spends_nothing(tmp_path: Path) -> None:
    registry = Registry()
    registry.rosters = [REPLACED]
    registry.keep(spent(tmp_path / "lost", jobs=2), OLD)
    spent(tmp_path / "node", jobs=1)
    node = Node(tmp_path / "node", registry, NEW)
    error = node.refusal()
    assert error.code is Code.CONFIG_INVALID
    assert "ends with entry 2, and entry 4" in error.message
    assert f"key {OLD.public().signing_key[:16]} of roster version 1" in error.message
    assert (differing(), registry.differences) == (1, [Head(2, registry.entries[1].sha256)])


def test_a_ledger_that_began_anew_under_new_keys_goes_no_further(tmp_path: Path) -> None:
    """As a node of the release before let it."""
    registry = Registry()
    registry.rosters = [REPLACED]
    registry.keep(spent(tmp_path / "lost"), OLD)
    node = Node(tmp_path / "node", registry, NEW)
    node.spend("anew")
    assert "ends with entry 2, and entry 4" in node.refusal().message


def test_a_whole_ledger_goes_on_under_new_keys(tmp_path: Path) -> None:
    registry = Registry()
    registry.rosters = [REPLACED]
    registry.keep(spent(tmp_path), OLD)
    node = Node(tmp_path, registry, NEW)
    node.require_same()
    node.spend("next")
    asyncio.run(node.spending.report(PATIENCE_S))
    assert len(registry.entries) == 6
    assert registry.entries[-1].head.signed_by("h1", NEW.public().signing_key, registry.signature)
    assert differing() == 0


@pytest.mark.parametrize("keys", [OLD, NEW])
def test_what_none_of_its_keys_signed_does_not_stop_a_hospital(tmp_path: Path, keys: MemberKeys) -> None:
    registry = Registry()
    registry.rosters = [REPLACED] if keys is NEW else []
    registry.keep([MADE_UP], KEYS["h2"])
    node = Node(tmp_path, registry, keys)
    if keys is NEW:
        node.spend("before")
    node.require_same()
    assert differing() == 1


def test_nothing_is_spent_before_the_registry_has_answered_once(tmp_path: Path) -> None:
    registry = Registry()
    registry.away = True
    node = Node(tmp_path, registry, OLD)
    error = node.refusal()
    assert (error.code, error.retryable) == (Code.SERVICE_UNAVAILABLE, True)
    registry.away = False
    node.require_same()
    registry.away = True
    node.require_same()


@pytest.mark.parametrize("founding", [FOUNDING, founded(*NAMES[1:])])
def test_nothing_is_spent_under_keys_that_no_roster_lists(tmp_path: Path, founding: Roster) -> None:
    """The file of another key, or a registry that hides the later rosters: former keys may be hidden with them."""
    registry = Registry()
    node = Node(tmp_path, registry, NEW, founding)
    error = node.refusal()
    assert (error.code, "does not list h1" in error.message) == (Code.WRONG_STATE, True)
    registry.rosters = [following(founding, NEW, *OTHERS)]
    if "h1" in founding:
        assert "was a member before" in node.refusal().message
    else:
        node.require_same()


def test_a_roster_that_two_looks_bring_at_once_is_taken_once(tmp_path: Path) -> None:
    registry = Registry()
    node = Node(tmp_path, registry, NEW)
    second = verify_successor(FOUNDING, REPLACED.statement, REPLACED.signatures)
    answers = iter([[REPLACED], [REPLACED, following(second, OLD, *OTHERS)]])

    async def both() -> None:
        await asyncio.gather(node.rosters.refresh(PATIENCE_S), node.rosters.refresh(PATIENCE_S))

    async def meanwhile(after_version: int, _patience_s: float) -> list[RosterFacts]:
        assert after_version == 1
        answer = next(answers)
        await asyncio.sleep(0)
        return answer

    registry.list_rosters = meanwhile  # type: ignore[method-assign]
    asyncio.run(both())
    assert node.rosters.newest.statement.version == 3
    assert list(node.rosters.signing_keys("h1").values()) == [1, 2]
