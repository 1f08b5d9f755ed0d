"""Which rosters a hospital believes, and how it keeps the keys of epochs."""

import asyncio
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import EpochFacts, RosterFacts
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.usecases.epochs import TURN_S, Epochs
from services.hospital_node.usecases.rosters import Rosters
from services.secure_sum.epoch import EpochKeys, make_epoch, maker_order, open_epoch
from services.secure_sum.roster import MemberKeys, Roster, found, sign_roster, verify_successor
from services.secure_sum.statements import Signed
from tests.support import rosters
from tests.support.secure_sum import make_roster

NAMES = ("h1", "h2", "h3", "h4")
KEYS = {name: MemberKeys.generate(name) for name in (*NAMES, "h5")}


def following(before: Roster, members: Iterable[str], signers: Iterable[str]) -> RosterFacts:
    return rosters.following(before, [KEYS[name] for name in members], [KEYS[name] for name in signers])


class Registry:
    """What a registry says about rosters and epochs; `stands` is published already."""

    def __init__(self) -> None:
        self.rosters: list[RosterFacts] = []
        self.present = ""
        self.stands: dict[tuple[str, int], Signed] = {}
        self.due, self.due_for_s = 1, 0.0
        self.public_key = False
        self.published: list[Signed] = []
        self.asked = 0

    async def list_rosters(self, after_version: int, _patience_s: float) -> list[RosterFacts]:
        return self.rosters[after_version - 1 :]

    async def get_epoch(self, roster_sha256: str, epoch: int, _patience_s: float) -> EpochFacts:
        self.asked += 1
        roster = roster_sha256 or self.present
        numbers = [number for sha256, number in self.stands if sha256 == roster]
        signed = self.stands.get((roster, epoch or max(numbers, default=0)))
        return EpochFacts(signed, self.due, self.due_for_s, self.present, public_key=self.public_key)

    async def publish_epoch(self, epoch: Signed, _patience_s: float) -> Signed:
        self.published.append(epoch)
        return self.stands.setdefault((self.present, self.due), epoch)


class Now:
    """Runs slow functions at once, and is the clock."""

    def __init__(self) -> None:
        self.time = datetime.now(UTC)

    def now(self) -> datetime:
        return self.time

    async def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)


class Hospital:
    """One hospital's rosters and epochs in a folder."""

    def __init__(self, folder: Path, registry: Registry, name: str = "h1", roster: Roster | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.registry, self.now = registry, Now()
        mesh: Any = registry
        self.rosters = Rosters(roster or founding_roster, SqliteNodeState(folder), mesh)
        registry.present = registry.present or self.rosters.newest.sha256
        self.files = EpochFiles(folder)
        self.used: set[tuple[str, int]] = set()
        worker: Any = self.now
        self.epochs = Epochs(KEYS[name], self.rosters, self.files, mesh, worker, self.now, lambda: self.used)


founding_roster = make_roster([KEYS[name] for name in NAMES])


def run(step: Any) -> Any:
    return asyncio.run(step)


# ---- rosters


def test_a_chain_is_followed_and_remembered(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    second = following(founding_roster, KEYS, NAMES[:3])
    roster = verify_successor(founding_roster, second.statement, second.signatures)
    third = following(roster, NAMES, KEYS)
    registry.rosters = [second, third]
    assert run(hospital.rosters.get(roster.sha256, 1)) == roster
    assert hospital.rosters.newest.statement.version == 3
    registry.rosters = []
    again = Hospital(tmp_path, registry)
    assert again.rosters.newest.statement.version == 3, "a registry that forgot does not take it back"
    assert run(again.rosters.get(founding_roster.sha256, 1)) == founding_roster


def test_rosters_that_are_refused(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    strangers = found("consortium", [KEYS[name].public() for name in ("h4", "h5")])
    for facts in (
        following(founding_roster, KEYS, NAMES[:2]),
        following(founding_roster, KEYS, (*NAMES[:2], "h5")),
        RosterFacts(strangers, {name: sign_roster(strangers, KEYS[name]) for name in ("h4", "h5")}),
        RosterFacts(b"{}", {}),
    ):
        registry.rosters = [facts]
        with pytest.raises(FedmeshError) as caught:
            run(hospital.rosters.get("ab" * 32, 1))
        assert caught.value.code is Code.STATEMENT_INVALID
        assert hospital.rosters.newest.statement.version == 1


def test_a_fork_is_not_followed(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    registry.rosters = [following(founding_roster, KEYS, NAMES)]
    run(hospital.rosters.refresh(1))
    mine = hospital.rosters.newest
    other = following(founding_roster, NAMES[:3], NAMES)
    fork = verify_successor(founding_roster, other.statement, other.signatures)
    registry.rosters = [other, following(fork, NAMES[:3], NAMES[:3])]
    run(hospital.rosters.refresh(1))
    assert hospital.rosters.newest == mine


def test_another_founding_roster_than_the_one_that_was_followed(tmp_path: Path) -> None:
    registry = Registry()
    registry.rosters = [following(founding_roster, KEYS, NAMES)]
    run(Hospital(tmp_path, registry).rosters.refresh(1))
    other = make_roster([KEYS[name] for name in NAMES[:3]])
    with pytest.raises(FedmeshError, match="founding roster is not the one") as caught:
        Hospital(tmp_path, registry, roster=other)
    assert caught.value.code is Code.CONFIG_INVALID


# ---- epochs


def test_members_make_a_due_epoch_in_turn(tmp_path: Path) -> None:
    registry = Registry()
    order = maker_order(founding_roster, 1)
    second, third = (Hospital(tmp_path / name, registry, name) for name in order[1:3])
    registry.due_for_s = TURN_S - 0.5
    assert run(second.epochs.look()) == pytest.approx(0.5)
    assert registry.published == []
    registry.due_for_s = TURN_S
    run(third.epochs.look())
    assert registry.published == []
    run(second.epochs.look())
    (made,) = registry.published
    assert made.hospital_id == order[1]
    registry.due = 0
    run(third.epochs.look())
    assert second.epochs.fingerprint() == third.epochs.fingerprint() != ""
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / order[1] / "epochs").iterdir())


def test_an_epoch_has_a_public_key_when_a_plan_needs_one(tmp_path: Path) -> None:
    registry = Registry()
    registry.due_for_s = 100.0
    hospital = Hospital(tmp_path, registry)
    run(hospital.epochs.look())
    assert run(hospital.epochs.get(founding_roster, 1, 1)).public_key is None
    registry.due, registry.public_key = 2, True
    run(hospital.epochs.look())
    made = run(hospital.epochs.get(founding_roster, 2, 1))
    assert made.public_key is not None
    (_, published) = registry.published
    assert open_epoch(published, KEYS["h2"], founding_roster) == made
    again = run(Hospital(tmp_path, registry).epochs.get(founding_roster, 2, 1))
    assert again == made, "read from its file"


def test_the_publication_that_stands_is_taken(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    keys, other = make_epoch(KEYS["h3"], founding_roster, 1)
    registry.due_for_s = 100.0

    async def faster(epoch: Signed, _patience_s: float) -> Signed:
        registry.published.append(epoch)
        return other

    registry.publish_epoch = faster  # type: ignore[method-assign]
    run(hospital.epochs.look())
    assert len(registry.published) == 1
    assert run(hospital.epochs.get(founding_roster, 1, 1)) == keys


def test_two_publications_of_one_number_are_noticed(tmp_path: Path) -> None:
    registry = Registry()
    registry.due = 0
    hospital = Hospital(tmp_path, registry)
    first, registry.stands[founding_roster.sha256, 1] = make_epoch(KEYS["h3"], founding_roster, 1)
    run(hospital.epochs.look())
    _, registry.stands[founding_roster.sha256, 1] = make_epoch(KEYS["h4"], founding_roster, 1)
    with pytest.raises(FedmeshError, match="two publications"):
        run(hospital.epochs.look())
    assert run(hospital.epochs.get(founding_roster, 1, 1)) == first


def test_an_epoch_that_a_task_names_is_fetched_once(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    keys, registry.stands[founding_roster.sha256, 2] = make_epoch(KEYS["h3"], founding_roster, 2)

    async def both() -> list[EpochKeys]:
        return await asyncio.gather(*(hospital.epochs.get(founding_roster, 2, 1) for _ in range(3)))

    assert run(both()) == [keys] * 3
    assert registry.asked == 1
    with pytest.raises(FedmeshError, match="nobody has published"):
        run(hospital.epochs.get(founding_roster, 3, 1))
    registry.stands[founding_roster.sha256, 4] = registry.stands[founding_roster.sha256, 2]
    with pytest.raises(FedmeshError, match="gave epoch 2 for 4"):
        run(hospital.epochs.get(founding_roster, 4, 1))


def aged(folder: Path, epoch: int, age: timedelta) -> None:
    (path,) = (folder / "epochs").glob(f"*.{epoch}.keys")
    then = (datetime.now(UTC) - age).timestamp()
    os.utime(path, (then, then))


def test_an_old_group_key_is_destroyed_once_nothing_uses_it(tmp_path: Path) -> None:
    registry = Registry()
    registry.due = 0
    hospital = Hospital(tmp_path, registry)
    sha256 = founding_roster.sha256
    made = {}
    for epoch in (1, 2):
        made[epoch], registry.stands[sha256, epoch] = make_epoch(KEYS["h2"], founding_roster, epoch)
        run(hospital.epochs.get(founding_roster, epoch, 1))
    run(hospital.epochs.look())
    assert [kept.epoch for kept in hospital.files.kept()] == [1, 2], "an attempt may just have begun with it"
    aged(tmp_path, 2, timedelta(minutes=11))
    hospital.used = {(sha256, 1)}
    run(hospital.epochs.look())
    assert [kept.epoch for kept in hospital.files.kept()] == [1, 2], "an attempt still needs it"
    (path,) = (tmp_path / "epochs").glob("*.1.keys")
    link = tmp_path / "link"
    link.hardlink_to(path)
    hospital.used = set()
    run(hospital.epochs.look())
    assert [kept.epoch for kept in hospital.files.kept()] == [2]
    assert not any(link.read_bytes())
    old = run(Hospital(tmp_path, registry).epochs.get(founding_roster, 1, 1))
    assert (old.group_key, old.state_key) == (b"", made[1].state_key), "fetched again it would not be destroyed"
    assert hospital.epochs.fingerprint() == made[2].sha256[:16]


def test_a_crash_in_the_middle_of_destroying_a_key(tmp_path: Path) -> None:
    files = EpochFiles(tmp_path)
    keys, _ = make_epoch(KEYS["h2"], founding_roster, 1)
    files.save(keys)
    whole = (tmp_path / "epochs" / f"{founding_roster.sha256}.1.keys").read_bytes()
    files.retire(founding_roster.sha256, 1)
    (tmp_path / "epochs" / f"{founding_roster.sha256}.1.keys").write_bytes(whole)
    again = EpochFiles(tmp_path)
    loaded = again.load(founding_roster.sha256, 1)
    assert loaded is not None
    assert loaded.group_key == b""
    again.retire(founding_roster.sha256, 1)
    assert again.kept() == []


def test_a_removed_member_gets_nothing_new(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry, "h4")
    facts = following(founding_roster, NAMES[:3], NAMES[:3])
    registry.rosters = [facts]
    roster = verify_successor(founding_roster, facts.statement, facts.signatures)
    registry.present = roster.sha256
    _, registry.stands[roster.sha256, 1] = make_epoch(KEYS["h1"], roster, 1)
    registry.due_for_s = 1000.0
    run(hospital.epochs.look())
    assert (registry.published, hospital.files.kept(), hospital.epochs.fingerprint()) == ([], [], "")
    with pytest.raises(FedmeshError):
        open_epoch(registry.stands[roster.sha256, 1], KEYS["h4"], roster)


def test_a_registry_that_goes_back_to_an_older_roster(tmp_path: Path) -> None:
    registry = Registry()
    hospital = Hospital(tmp_path, registry)
    registry.rosters = [following(founding_roster, KEYS, NAMES)]
    run(hospital.rosters.refresh(1))
    registry.due_for_s = 1000.0
    with pytest.raises(FedmeshError, match="older"):
        run(hospital.epochs.look())
    assert registry.published == []
