"""Thousands of ways in which attempts can go wrong. Replay one: `python -m tests.simulation --seed N`."""

import re
from collections.abc import Callable

import pytest

from services.secure_sum.member import MemberState
from services.secure_sum.parameters import parameter_set_names
from services.secure_sum.statements import AttemptRef
from tests.simulation.arithmetic import Segments
from tests.simulation.centre import Coordinator, Running
from tests.simulation.hospital import Hospital, Outcome
from tests.simulation.messages import Task
from tests.simulation.oracle import Violation
from tests.simulation.schedules import build, encrypted, play, play_all, total
from tests.simulation.world import Weather, World

CHUNK = 25
DEFAULT_CHUNKS = 12
SLOW_CHUNKS = 208


def run_chunk(chunk: int) -> None:
    whole = total(play_all(range(chunk * CHUNK, (chunk + 1) * CHUNK)))
    assert whole.committed >= CHUNK // 2


@pytest.mark.parametrize("chunk", range(DEFAULT_CHUNKS))
def test_every_sum_is_the_survivors_sum_or_there_is_none(chunk: int) -> None:
    run_chunk(chunk)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(DEFAULT_CHUNKS, SLOW_CHUNKS))
def test_every_sum_is_the_survivors_sum_or_there_is_none_in_many_more(chunk: int) -> None:
    run_chunk(chunk)


def test_sums_under_encryption_are_the_survivors_sums() -> None:
    assert total(play_all(range(3000, 3008), encrypted())).committed >= 4


@pytest.mark.slow
@pytest.mark.parametrize("parameter_set", parameter_set_names())
@pytest.mark.parametrize("chunk", range(8))
def test_sums_under_encryption_are_the_survivors_sums_in_many_more(chunk: int, parameter_set: str) -> None:
    seeds = range(3100 + CHUNK * chunk, 3100 + CHUNK * (chunk + 1))
    assert total(play_all(seeds, encrypted(parameter_set))).committed >= CHUNK // 2


def test_the_schedules_reach_what_they_are_for() -> None:
    whole = total(play_all(range(1000, 1020)))
    expected = {
        "aborted",
        "ciphertexts lost",
        "coordinator lost",
        "crash early",
        "crash unsaved",
        "crash unsent",
        "deadline",
        "duplicated",
        "left",
        "lost",
        "replay",
        "restart",
    }
    assert expected <= whole.happened.keys()


def test_a_seed_decides_every_event() -> None:
    logs = []
    for _ in range(2):
        world = build(7)
        world.run()
        logs.append(world.log)
    assert logs[0] == logs[1]


def test_a_failure_says_how_to_play_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinator, "_unmask", counting_twice)
    with pytest.raises(Violation, match=r"replay: python -m tests\.simulation --seed 4$"):
        play(4)


# --- what the oracle must notice


def forgetful_save(hospital: Hospital, outcome: Outcome) -> None:
    """Send first, save never: a crash makes the hospital answer twice."""
    hospital._memory[outcome.answer.attempt] = outcome.state
    hospital.disk.setdefault(outcome.answer.attempt, outcome.record)


def beginning_anew(coordinator: Coordinator) -> Running:
    """Another attempt although survivors are stored."""
    coordinator._registry.stored = None
    return Running(coordinator._registry.open_attempt())


def careless_hospital(hospital: Hospital, attempt: AttemptRef) -> list[MemberState]:
    """Forgets that it revealed in another attempt."""
    return []


def unchecked(hospital: Hospital, state: object, task: Task) -> None:
    """Believes any sum."""


def counting_twice(coordinator: Coordinator, late: bool) -> None:
    """An aggregator that adds the first survivor's upload again."""
    real_unmask(coordinator, late)
    if coordinator.run.opening and coordinator.run.total:
        doubled = [*coordinator.run.listed, coordinator.run.listed[0]]
        uploads: list[Segments] = [coordinator._ciphertexts[coordinator.run.attempt, h] for h in doubled]
        coordinator.run.total = coordinator._arithmetic.total(uploads, ())


real_unmask = Coordinator._unmask


RESTLESS = Weather(events=250, coordinator=0.03, crash=0.05)
"""Coordinators are often replaced, hospitals often crash."""


def find() -> str:
    for seed in range(200):
        try:
            World(seed, 4, RESTLESS).run()
        except Violation as violation:
            return str(violation)
    return "nothing"


@pytest.mark.parametrize(
    ("patches", "promise"),
    [
        ([(Hospital, "save", forgetful_save)], "same bytes"),
        (
            [(Coordinator, "_begin", beginning_anew), (Hospital, "other_attempts", careless_hospital)],
            "is unmasked for one round|is revealed in|are not the stored",
        ),
        ([(Coordinator, "_begin", beginning_anew)], "revealed in another attempt"),
        ([(Coordinator, "_unmask", counting_twice)], "the aggregator's sum is wrong"),
        (
            [(Coordinator, "_unmask", counting_twice), (Hospital, "check_sum", unchecked)],
            "the accepted sum is the survivors' sum",
        ),
    ],
    ids=["unsaved answers", "a second attempt", "a second attempt, refused", "a wrong sum, refused", "a wrong sum"],
)
def test_the_simulation_notices(
    monkeypatch: pytest.MonkeyPatch, patches: list[tuple[type, str, Callable[..., object]]], promise: str
) -> None:
    for owner, name, substitute in patches:
        monkeypatch.setattr(owner, name, substitute)
    assert re.search(promise, find())
