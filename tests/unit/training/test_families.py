"""Every family against an independent computation in NumPy, and on something that it can learn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.training.scoring import log_odds
from services.hospital_node.training.state import State, initial_state, initial_weights, read_state, states_close
from services.hospital_node.training.trainer import CHUNK, Trainer, _capped_rows, _tensor_parts, predict
from services.plans.algorithms import AdaptiveServer, FedProx, Ridge
from services.plans.manifest import PlanManifest
from services.tradeoff.simulation import Simulation
from tests.support.family_plans import BLOCKS, DOCUMENTS, PLANS
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, dataset, manifest

Reals = NDArray[np.float64]


def numeric_gradient(plan: PlanManifest, x: Reals, y: NDArray[np.floating[Any]], weights: Reals) -> Reals:
    """Gradient of each row's log loss by central differences of the score: float64 [rows, weights]."""
    steps = np.eye(len(weights)) * 1e-5
    slopes = [(log_odds(plan, weights + step, x) - log_odds(plan, weights - step, x)) / 2e-5 for step in steps]
    residual = 1 / (1 + np.exp(-log_odds(plan, weights, x))) - y
    gradients: Reals = residual[:, np.newaxis] * np.stack(slopes, axis=1)
    return gradients


def penalty(plan: PlanManifest) -> Reals:
    parts = []
    for inputs, outputs in plan.network.layers(len(plan.feature_names)):
        parts += [np.full(inputs * outputs, plan.network.l2), np.zeros(outputs)]
    return np.concatenate(parts)


def some_state(plan: PlanManifest, seed: int = 5) -> State:
    rng = np.random.default_rng(seed)
    weights, velocity, average = rng.normal(0, 0.3, (3, plan.weights_length)).astype(np.float32)
    squares = rng.uniform(0.01, 0.2, plan.weights_length).astype(np.float32)
    return State(2, weights, velocity, average, squares if plan.algorithm.second_moment else None)


def with_outcomes(data: Dataset, y: NDArray[np.bool_]) -> Dataset:
    return Dataset(**{**vars(data), "y": y.astype(np.float32)})


def trained(plan: PlanManifest, data: Dataset, cache: Path, rounds: int) -> bytes:
    trainer = Trainer(plan, data, cache)
    state = trainer.initial_state()
    for number in range(1, rounds + 1):
        state = trainer.update(state, trainer.contribution(state, number), 1)
    return state


def loss_and_accuracy(plan: PlanManifest, data: Dataset, state: bytes) -> tuple[float, float]:
    rows = data.rows(SplitName.VALIDATION)
    probability = np.clip(predict(plan, state, rows.x), 1e-9, 1 - 1e-9)
    likelihood = np.where(rows.y > 0.5, probability, 1 - probability)
    return float(-np.log(likelihood).mean()), float(((probability > 0.5) == (rows.y > 0.5)).mean())


def test_fedprox_without_its_pull_is_fedavg_bit_for_bit(cache: Path) -> None:
    plain, prox = manifest(FEDAVG), PLANS["fedprox-zero"]
    data, state = dataset(plain, 3, patients=60), some_state(plain).to_bytes()
    first, second = Trainer(plain, data, cache), Trainer(prox, data, cache)
    total = first.contribution(state, 1)
    assert np.abs(total).max() > 1000
    assert (second.contribution(state, 1) == total).all()
    assert second.update(state, total, 1) == first.update(state, total, 1)


def test_fedprox_pulls_towards_the_shared_weights(cache: Path) -> None:
    plan = PLANS["fedprox"]
    algorithm = plan.algorithm
    assert isinstance(algorithm, FedProx)
    data, state = dataset(plan, 3, patients=60), some_state(plan)
    rows, shared = data.rows(SplitName.TRAIN), state.weights.astype(np.float64)
    weights, velocity = shared, np.zeros_like(shared)
    for _ in range(algorithm.local_steps):
        gradient = numeric_gradient(plan, rows.x.astype(np.float64), rows.y, weights).mean(axis=0)
        velocity = algorithm.momentum * velocity + gradient + penalty(plan) * weights
        velocity = velocity + algorithm.mu * (weights - shared)
        weights = weights - algorithm.learning_rate * velocity
    trainer = Trainer(plan, data, cache)
    total = trainer.contribution(state.to_bytes(), 1)
    assert total[plan.train_length - 1] == len(rows.y)
    moved = total[: plan.train_length - 1] / plan.encoding.scale / len(rows.y)
    np.testing.assert_allclose(moved, weights - shared, atol=1e-5)
    after = read_state(trainer.update(state.to_bytes(), total, 1))
    np.testing.assert_allclose(after.weights, shared + 0.5 * moved, atol=1e-6)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_servers_by_hand(cache: Path, name: str) -> None:
    """Two rounds of Reddi et al. (2021), algorithm 2, from the initial state; the sum is what hospitals would send."""
    plan = PLANS[name]
    algorithm = plan.algorithm
    assert isinstance(algorithm, AdaptiveServer)
    trainer = Trainer(plan, None, cache)
    state = trainer.initial_state()
    weights = initial_weights(plan).astype(np.float64)
    first, second = np.zeros_like(weights), np.full_like(weights, algorithm.tau**2)
    rng = np.random.default_rng(4)
    for _ in range(2):
        total = np.zeros(plan.vector_length, dtype=np.int64)
        total[: plan.weights_length] = rng.integers(-(10**9), 10**9, plan.weights_length)
        total[plan.train_length - 1] = 70
        movement = total[: plan.weights_length] / plan.encoding.scale / 70
        first = algorithm.beta1 * first + (1 - algorithm.beta1) * movement
        if name == "fedadam":
            second = algorithm.beta2 * second + (1 - algorithm.beta2) * movement**2
        else:
            second = second - (1 - algorithm.beta2) * movement**2 * np.sign(second - movement**2)
        weights = weights + algorithm.server_learning_rate * first / (np.sqrt(second) + algorithm.tau)
        state = trainer.update(state, total, 1)
    after = read_state(state, plan)
    assert after.squares is not None
    np.testing.assert_allclose(after.weights, weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.velocity, first, rtol=1e-5)
    np.testing.assert_allclose(after.squares, second, rtol=1e-5)
    np.testing.assert_array_equal(after.average, after.weights)


def test_states_with_a_second_moment() -> None:
    plan = PLANS["fedadam"]
    state = some_state(plan)
    data = state.to_bytes()
    assert read_state(data, plan).to_bytes() == data
    assert state.squares is not None
    near = State(2, state.weights, state.velocity, state.average, state.squares * np.float32(1 + 1e-6))
    far = State(2, state.weights, state.velocity, state.average, state.squares * np.float32(1.01))
    without = State(2, state.weights, state.velocity, state.average)
    assert states_close(data, near.to_bytes())
    assert not states_close(data, far.to_bytes())
    assert not states_close(data, without.to_bytes())
    for wrong in (without.to_bytes(), data[:-4]):
        with pytest.raises(FedmeshError) as caught:
            read_state(wrong, plan)
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_initial_weights_follow_from_the_plan_alone() -> None:
    plan = PLANS["fedadam"]
    weights = initial_weights(plan)
    assert initial_state(plan) == initial_state(plan)
    assert weights[-1] == plan.network.initial_intercept
    matrix = weights[:40]
    assert 0.3 < np.abs(matrix).mean() / math.sqrt(6 / 13) < 0.7
    assert np.abs(matrix).max() <= np.float32(math.sqrt(6 / 13))
    assert not weights[40:48].any(), "biases start at 0"
    other = manifest(changed(DOCUMENTS["fedadam"], "model.seed", 8))
    assert (initial_weights(other)[:40] != matrix).all()
    # Pinned: hospitals with another NumPy must start from the same bytes.
    assert matrix[:2].tolist() == pytest.approx([0.22483639, 0.17750052], abs=1e-7)


@pytest.mark.parametrize("name", ["fedprox", "fedadam", "mlp-private"])
def test_the_graph_and_numpy_score_alike(cache: Path, name: str) -> None:
    """The histogram of scores in the contribution is that of the predictions."""
    plan, data = PLANS[name], dataset(PLANS[name], 9, patients=80)
    assert plan.metrics is not None
    state = some_state(plan).to_bytes()
    part = Trainer(plan, data, cache).contribution(state, 4)[plan.train_length :]
    histograms = part[: 2 * plan.metrics.score_bins].reshape(2, -1).sum(axis=0) / plan.encoding.metrics_units
    rows = data.rows(SplitName.VALIDATION)
    # With privacy one encounter of each patient counts; drawn the same way, so compare shares of the bins.
    probability = predict(plan, state, rows.x)
    low, high = plan.metrics.logit_range
    scores = np.log(probability / (1 - probability))
    position = np.clip(
        np.floor((scores - low) / (high - low) * plan.metrics.score_bins), 0, plan.metrics.score_bins - 1
    )
    expected = np.bincount(position.astype(np.int64), minlength=plan.metrics.score_bins)
    if plan.privacy is None:
        # A score on a bin's edge may fall on either side.
        assert np.abs(histograms - expected).sum() <= 2
    else:
        assert histograms.sum() == rows.patients
        assert (histograms <= expected + 1).all()


def test_private_mlp_is_the_sum_of_clipped_patient_gradients(cache: Path) -> None:
    plan = PLANS["mlp-private"]
    assert plan.privacy is not None
    data, state = dataset(plan, 1, patients=30), some_state(plan)
    rows = data.rows(SplitName.TRAIN)
    single = np.bincount(rows.patient) <= plan.privacy.max_encounters_per_patient
    keep = single[rows.patient]
    kept = Dataset(
        **{**vars(data), **{name: getattr(data, name)[data.split == SplitName.TRAIN][keep] for name in _ROWS}}
    )
    patients = np.unique(kept.patient, return_inverse=True)[1]
    kept = Dataset(**{**vars(kept), "patient": patients})
    vector = Trainer(plan, kept, cache).contribution(state.to_bytes(), 1)
    gradients = numeric_gradient(plan, kept.x.astype(np.float64), kept.y, state.weights.astype(np.float64))
    bound = plan.train_sensitivity - math.sqrt(plan.train_length) / 2
    expected, clipped = np.zeros(plan.train_length), 0
    for patient in range(patients.max() + 1):
        scaled = gradients[patients == patient].sum(axis=0) * plan.encoding.scale
        clipped += int(np.linalg.norm(scaled) > bound)
        expected += np.round(scaled * min(1.0, bound / np.linalg.norm(scaled)))
    assert 0 < clipped < patients.max()
    np.testing.assert_allclose(vector[: plan.train_length], expected, atol=patients.max() + 1)
    assert np.abs(vector[: plan.train_length]).max() > 20 * patients.max()


_ROWS = ("x", "y", "patient", "split", "encounter_ids", "patient_ids")
_NUMBERS = st.one_of(
    st.floats(-50, 50, width=32),
    st.floats(width=32, allow_subnormal=False),
    st.sampled_from([0.0, 1e30, -1e30, math.inf, -math.inf, math.nan]),
)


@pytest.mark.parametrize("name", ["mlp-private", "ridge-private", "weighted-private"])
@pytest.mark.usefixtures("installed")
def test_no_patient_exceeds_the_sensitivity(cache: Path, name: str) -> None:
    """The integers of one patient with any records, by any family: exact, and at most the integer bound."""
    plan = PLANS[name]
    trainer, reached = Trainer(plan, one_patient(plan, [(1.0,) * 6]), cache), []

    @settings(max_examples=100, deadline=None, database=None)
    @given(
        rows=st.lists(st.tuples(*[_NUMBERS] * 5, st.booleans()), min_size=1, max_size=2),
        size=st.sampled_from([0.3, 30.0]),
    )
    def check(rows: list[tuple[float, ...]], size: float) -> None:
        # Opening a trainer for every example would take minutes.
        trainer._data = _tensor_parts(plan, *_capped_rows(plan, one_patient(plan, rows)), CHUNK)
        weights = (initial_weights(plan) * size + size).astype(np.float32)
        state = State(0, weights, np.zeros_like(weights), weights).to_bytes()
        vector = [int(value) for value in trainer.contribution(state, 1)[: plan.train_length]]
        reached.append(sum(value * value for value in vector) / plan.train_sensitivity**2)
        assert reached[-1] <= 1

    check()
    assert max(reached) > 0.95, "some of them were clipped"


def one_patient(plan: PlanManifest, rows: Sequence[tuple[float, ...]]) -> Dataset:
    """A training patient with these encounters: features, then the outcome."""
    count = len(rows)
    return Dataset(
        **{
            **vars(dataset(plan, 0, patients=1)),
            "x": np.array([row[:5] for row in rows], dtype=np.float32),
            "y": np.array([row[5] for row in rows], dtype=np.float32),
            "patient": np.zeros(count, dtype=np.int64),
            "split": np.full(count, SplitName.TRAIN, dtype=np.int8),
            "encounter_ids": np.array([f"e{row}" for row in range(count)], dtype=np.object_),
            "patient_ids": np.array(["p"] * count, dtype=np.object_),
        }
    )


def test_blocks_of_patients_change_nothing(cache: Path) -> None:
    """Seven patients at a time, and rows in any order."""
    whole, data, state = manifest(PRIVATE), dataset(BLOCKS, 2, patients=99), some_state(BLOCKS).to_bytes()
    expected = Trainer(whole, data, cache).contribution(state, 1)
    assert np.abs(expected).max() > 1000
    assert (Trainer(BLOCKS, data, cache).contribution(state, 1) == expected).all()
    order = np.random.default_rng(1).permutation(len(data.y))
    mixed = Dataset(**{**vars(data), **{name: getattr(data, name)[order] for name in _ROWS}})
    found = Trainer(BLOCKS, mixed, cache).contribution(state, 1)
    # A patient's encounters are added in another order.
    np.testing.assert_allclose(found, expected, atol=99)


def closed_form(plan: PlanManifest, x: Reals, y: Reals) -> Reals:
    """Ridge regression on y - p with a free intercept, on the scale of log-odds."""
    algorithm = plan.algorithm
    assert isinstance(algorithm, Ridge)
    rate = 1 / (1 + math.exp(-plan.network.initial_intercept))
    ones = np.concatenate([x, np.ones((len(y), 1))], axis=1)
    matrix = ones.T @ ones + algorithm.expected_patients * np.diag([plan.network.l2] * x.shape[1] + [0.0])
    solution = np.linalg.solve(matrix, ones.T @ (y - rate)) / (rate * (1 - rate))
    solution[-1] += plan.network.initial_intercept
    return np.asarray(solution)


def test_ridge_without_noise_is_the_closed_form(cache: Path) -> None:
    """Also when hospitals add up: their sums are those of all rows together."""
    plan = PLANS["ridge"]
    parts = [dataset(plan, seed, patients=80) for seed in (1, 2, 3)]
    rows = [part.rows(SplitName.TRAIN) for part in parts]
    x, y = np.concatenate([part.x for part in rows]), np.concatenate([part.y for part in rows])
    expected = closed_form(plan, x.astype(np.float64), y.astype(np.float64))
    state = Simulation(plan, parts, cache).run(plan, lambda: None)
    np.testing.assert_allclose(read_state(state, plan).average, expected, rtol=1e-5, atol=1e-5)


def test_what_is_compared_offline_has_the_hospitals_noise(cache: Path) -> None:
    plan = PLANS["ridge-private"]
    simulation = Simulation(plan, [dataset(plan, seed) for seed in range(4)], cache)
    assert simulation.run(plan, lambda: None) != simulation.run(plan, lambda: None)


def test_ridge_survives_noise_that_leaves_no_matrix_to_invert(cache: Path) -> None:
    plan = PLANS["ridge-private"]
    trainer = Trainer(plan, None, cache)
    rng = np.random.default_rng(0)
    for _ in range(20):
        total = rng.normal(0, 1e6, plan.vector_length).astype(np.int64)
        weights = read_state(trainer.update(trainer.initial_state(), total, 3)).weights.astype(np.float64)
        # No direction is divided by less than l2.
        rate = 1 / (1 + math.exp(1))
        moment = total[plan.weights_length * (plan.weights_length + 1) // 2 :] / plan.encoding.scale / 100 / 3
        weights[-1] += 1
        assert np.linalg.norm(weights) <= np.linalg.norm(moment) / 0.05 / (rate * (1 - rate)) * 1.001


@pytest.mark.parametrize("name", ["fedprox", "fedadam", "fedyogi", "mlp-private", "ridge", "ridge-private"])
def test_every_family_learns(cache: Path, name: str) -> None:
    """A linear rule with 5 % of the outcomes turned round: near what the best possible model reaches."""
    plan = PLANS[name]
    data = dataset(plan, 8, patients=400)
    turned = np.random.default_rng(8).random(len(data.y)) < 0.05
    data = with_outcomes(data, (data.x[:, 0] + data.x[:, 1] > 0) ^ turned)
    before, _ = loss_and_accuracy(plan, data, initial_state(plan))
    after, accuracy = loss_and_accuracy(plan, data, trained(plan, data, cache, rounds=_ROUNDS.get(name, 1)))
    assert after < before - 0.2
    assert accuracy > 0.88


_ROUNDS = {"fedprox": 20, "fedadam": 10, "fedyogi": 40, "mlp-private": 15}


def test_an_mlp_learns_what_no_linear_model_can(cache: Path) -> None:
    """Exclusive or: the sign of a product."""
    plan, linear = PLANS["fedadam"], PLANS["fedyogi"]
    data = dataset(plan, 8, patients=600)
    data = with_outcomes(data, data.x[:, 0] * data.x[:, 1] > 0)
    _, accuracy = loss_and_accuracy(plan, data, trained(plan, data, cache, rounds=40))
    _, at_most = loss_and_accuracy(linear, data, trained(linear, data, cache, rounds=40))
    assert accuracy > 0.9
    assert at_most < 0.65


@pytest.mark.usefixtures("installed")
def test_an_installed_family_is_clipped_like_any_other(cache: Path) -> None:
    """The example package: gradients of positive outcomes count three times."""
    plan = PLANS["weighted-private"]
    assert plan.privacy is not None
    data, state = dataset(plan, 6, patients=40), some_state(plan)
    kept = Dataset(**{**vars(data), "encounter_ids": np.array(["e"] * len(data.y), dtype=np.object_)})
    rows = kept.rows(SplitName.TRAIN)
    x = np.concatenate([rows.x, np.ones((len(rows.y), 1))], axis=1).astype(np.float64)
    residual = 1 / (1 + np.exp(-x @ state.weights.astype(np.float64))) - rows.y
    gradients = (residual * (1 + 2 * rows.y))[:, np.newaxis] * x
    bound = plan.train_sensitivity - math.sqrt(plan.train_length) / 2
    expected = np.zeros(plan.train_length)
    for patient in range(rows.patients):
        # Equal ids have equal digests: the first encounters are the ones that take part.
        own = np.flatnonzero(rows.patient == patient)[: plan.privacy.max_encounters_per_patient]
        scaled = gradients[own].sum(axis=0) * plan.encoding.scale
        expected += np.round(scaled * min(1.0, bound / np.linalg.norm(scaled)))
    trainer = Trainer(plan, kept, cache)
    vector = trainer.contribution(state.to_bytes(), 1)
    np.testing.assert_allclose(vector[: plan.train_length], expected, atol=rows.patients)
    after = read_state(trainer.update(state.to_bytes(), vector, 1))
    mean = vector[: plan.train_length] / plan.encoding.scale / 100
    np.testing.assert_allclose(after.average, state.weights - 0.5 * mean, atol=1e-6)
