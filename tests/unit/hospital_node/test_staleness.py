"""Results that outlive a round: which may be used, and what a round makes of them."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import Policy, require_acceptable
from services.hospital_node.domain.staleness import Trained, contribution, training_round
from services.hospital_node.domain.tasks import AttemptId, Task, TaskKind
from services.hospital_node.noise import training_noise
from services.hospital_node.usecases.trainings import Trainings
from services.plans.staleness import WEIGHT_UNITS, weight_units
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, manifest

ROUNDS = {"count": 4, "mode": "asynchronous", "k": 3, "max_age": 2}
PLAN = manifest(changed(PRIVATE, "rounds", ROUNDS))
PLAIN = manifest(changed(FEDAVG, "rounds", ROUNDS))


def task(round_number: int, attempt: int = 1) -> Task:
    named = AttemptId("job", round_number, attempt)
    return Task(TaskKind.TRAIN, named, "plan", round_number - 1, "", None, (), (), (), "", "", "", "")


def result(version: int, values: object = None) -> Trained:
    return Trained(version, np.arange(3) if values is None else np.asarray(values, dtype=np.int64))


# ---- what a round makes of a result


def test_the_training_part_is_weighted_exactly_and_the_metrics_are_not() -> None:
    values = np.arange(PLAN.vector_length, dtype=np.int64) - 5
    made = contribution(PLAN, result(0, values), age=2, round_number=2)
    train = PLAN.train_length
    assert np.array_equal(made[:train], values[:train] * weight_units(2))
    assert np.array_equal(made[train:], values[train:]), "round 2 has metrics"
    assert not contribution(PLAN, result(0, values), age=2, round_number=3)[train:].any(), "round 3 has none"
    assert training_round(PLAN, task(3).attempt) in PLAN.metrics_rounds
    assert training_round(manifest(PRIVATE), task(3).attempt) == 3


def test_a_synchronous_contribution_is_the_result_itself() -> None:
    values = np.arange(PLAN.vector_length, dtype=np.int64)
    assert contribution(manifest(PRIVATE), result(0, values), 0, 3) is values


def test_rows_count_in_full_so_that_age_shortens_the_step() -> None:
    values = np.full(PLAIN.vector_length, 7, dtype=np.int64)
    made = contribution(PLAIN, result(0, values), age=3, round_number=1)
    assert set(made[: PLAIN.weights_length]) == {7 * 32}
    assert made[PLAIN.weights_length] == 7 * WEIGHT_UNITS


def test_one_patient_moves_the_sum_by_no_more_than_the_noise_is_calibrated_for() -> None:
    patient = np.zeros(PLAN.vector_length, dtype=np.int64)
    patient[0] = PLAN.train_sensitivity
    norms = [np.linalg.norm(contribution(PLAN, result(0, patient), age, 1)[: PLAN.train_length]) for age in range(3)]
    assert norms[0] == PLAN.summed_sensitivity
    assert max(norms) == norms[0]
    noise, before = training_noise(PLAN, 15), training_noise(manifest(PRIVATE), 15)
    assert noise.share_sigma / PLAN.summed_sensitivity == pytest.approx(
        before.share_sigma / manifest(PRIVATE).train_sensitivity, rel=1e-3
    )


def test_what_does_not_fit_is_clipped_with_privacy_and_refused_without() -> None:
    limit = (1 << (PLAN.encoding.bits - 1)) // 16 // WEIGHT_UNITS
    large = np.full(PLAN.vector_length, -limit, dtype=np.int64)
    assert np.abs(contribution(PLAN, result(0, large), 0, 2)[: PLAN.train_length]).max() == (limit - 1) * WEIGHT_UNITS
    with pytest.raises(FedmeshError, match="exceeds its lane") as caught:
        contribution(PLAIN, result(0, np.full(PLAIN.vector_length, limit)), 0, 2)
    assert caught.value.code is Code.WRONG_STATE


def test_groups_below_the_threshold_are_refused() -> None:
    policy = Policy("h1", "p", 1.0, 1e-5, True, 100, 1000)
    require_acceptable(policy, PLAN, 4)
    with pytest.raises(FedmeshError, match=r"rounds\.k = 3: a group has at least 4") as caught:
        require_acceptable(policy, PLAN, 5)
    assert caught.value.code is Code.PRIVACY_REFUSED


# ---- which result a round gets


class Training:
    """Makes results by hand: `gates` by version hold training back."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.spent: set[int] = set()
        self.trainings = Trainings()

    async def get(self, asked: Task, oldest: int) -> Trained:
        async def make() -> Trained:
            self.began.append(asked.base_version)
            if asked.base_version in self.gates:
                await self.gates[asked.base_version].wait()
            return result(asked.base_version)

        async def used(trained: Trained) -> bool:
            return trained.version in self.spent

        return await self.trainings.get(asked, oldest, make, used)


async def test_a_result_waits_for_the_round_that_it_goes_into() -> None:
    training = Training()
    first = await training.get(task(1), 2)
    assert await training.get(task(3), 2) is first
    assert first.age(task(3)) == 2
    assert training.began == [0]


async def test_a_result_beyond_the_bound_is_thrown_away_and_the_newest_version_trained_on() -> None:
    training = Training()
    await training.get(task(1), 2)
    fresh = await training.get(task(4), 2)
    assert (fresh.version, fresh.age(task(4))) == (3, 0)
    assert training.began == [0, 3]


async def test_training_outlives_the_task_that_asked_for_it() -> None:
    training = Training()
    training.gates[0] = asyncio.Event()
    asking = asyncio.ensure_future(training.get(task(1), 2))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    again = asyncio.ensure_future(training.get(task(2), 2))
    await asyncio.sleep(0)
    training.gates[0].set()
    assert (await again).version == 0
    assert training.began == [0]


async def test_whoever_awaits_training_gets_it_though_its_job_was_forgotten() -> None:
    training = Training()
    training.gates[0] = asyncio.Event()
    asking = asyncio.ensure_future(training.get(task(1), 2))
    await asyncio.sleep(0)
    training.trainings.forget()
    training.gates[0].set()
    assert (await asking).version == 0


async def test_training_that_would_be_too_old_is_not_waited_for() -> None:
    training = Training()
    training.gates[0] = asyncio.Event()
    asking = asyncio.ensure_future(training.get(task(1), 1))
    await asyncio.sleep(0)
    asking.cancel()
    assert (await training.get(task(3), 1)).version == 2


async def test_a_result_that_went_into_another_version_is_not_used_again() -> None:
    training = Training()
    await training.get(task(1), 2)
    training.spent.add(0)
    assert (await training.get(task(2), 2)).version == 1


async def test_synchronous_rounds_take_no_result_of_the_round_before() -> None:
    training = Training()
    first = await training.get(task(1), 0)
    assert await training.get(task(1, attempt=2), 0) is first
    assert (await training.get(task(2), 0)).version == 1


async def test_another_state_of_the_same_version_gets_a_result_of_its_own() -> None:
    training = Training()
    first = await training.get(task(2), 2)
    other = replace(task(2, attempt=2), base_state_sha256="ab" * 32)
    assert await training.get(other, 2) is not first


async def test_a_failure_is_not_remembered() -> None:
    trainings = Trainings()

    async def fail() -> Trained:
        raise FedmeshError(Code.SERVICE_UNAVAILABLE, "away")

    async def never(_trained: Trained) -> bool:
        return False

    with pytest.raises(FedmeshError, match="away"):
        await trainings.get(task(1), 2, fail, never)
    assert (await trainings.get(task(1), 2, lambda: _made(0), never)).version == 0


async def _made(version: int) -> Trained:
    return result(version)


def test_attempts_at_other_rounds_are_known_oldest_first() -> None:
    trained = result(0)
    trained.attempts.update(task(number, attempt).attempt for number, attempt in ((2, 1), (1, 2), (3, 1)))
    assert trained.elsewhere(task(3).attempt) == [task(1, 2).attempt, task(2).attempt]
