"""Schedules of asynchronous rounds. Replay one: `python -m tests.simulation --asynchronous --seed N`."""

from dataclasses import replace

import pytest

from services.secure_sum.statements import AttemptRef
from tests.simulation.asynchronous import Result, SlowHospital, play_slow
from tests.simulation.messages import Task
from tests.simulation.oracle import Violation
from tests.simulation.schedules import total
from tests.simulation.world import Summary

CHUNK = 10


@pytest.fixture(scope="module")
def played() -> Summary:
    return total(play_slow(seed) for seed in range(2 * CHUNK))


def test_every_sum_is_that_of_its_weighted_results(played: Summary) -> None:
    assert played.committed >= 2 * CHUNK


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(2, 102))
def test_every_sum_is_that_of_its_weighted_results_in_many_more(chunk: int) -> None:
    whole = total(play_slow(seed) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK))
    assert whole.committed >= CHUNK


def test_the_schedules_reach_what_they_are_for(played: Summary) -> None:
    expected = {"aborted", "busy", "coordinator lost", "crash unsaved", "discarded", "left", "restart", "stale"}
    assert expected <= played.happened.keys()
    assert played.happened["stale"] > 1


# --- what must be noticed


def forgetful(hospital: SlowHospital, result: Result, attempt: AttemptRef) -> bool:
    """Does not look whether a result was sent."""
    return False


def find(seeds: range) -> str:
    for seed in seeds:
        try:
            play_slow(seed)
        except Violation as violation:
            return str(violation)
    return "nothing"


def test_a_result_that_is_sent_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowHospital, "sent_elsewhere", forgetful)
    assert "sends one result for one version" in find(range(200))


def test_an_age_that_is_not_true_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SlowHospital._result

    def younger(hospital: SlowHospital, task: Task) -> Result:
        return replace(real(hospital, task), version=task.attempt.round - 1)

    monkeypatch.setattr(SlowHospital, "_result", younger)
    assert "says the age of what it contributes" in find(range(100))
