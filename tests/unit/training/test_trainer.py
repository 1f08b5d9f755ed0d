"""The compiled plans against an independent NumPy implementation."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.bench.privacy_audit import clipped_sum
from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset, Rows, SplitName
from services.hospital_node.training.state import State, initial_state, read_state, states_close
from services.hospital_node.training.trainer import Trainer, predict, segments
from services.plans.algorithms import FedAvg, GradientDescent
from services.plans.manifest import PlanManifest
from tests.support.tiny_plan import FEDAVG, PRIVATE, dataset, manifest

PLAN = manifest(PRIVATE)
PLAIN = manifest(FEDAVG)
Reals = NDArray[np.float64]


def sigmoid(z: Reals) -> Reals:
    return 1 / (1 + np.exp(-z))


def with_intercept(rows: Rows) -> Reals:
    return np.concatenate([rows.x, np.ones((len(rows.y), 1))], axis=1).astype(np.float64)


def capped(rows: Rows, cap: int) -> NDArray[np.bool_]:
    """Rows that take part: of each patient those with the smallest digests of their ids."""
    keep = np.zeros(len(rows.y), dtype=bool)
    for patient in range(rows.patients):
        own = np.flatnonzero(rows.patient == patient)
        keep[sorted(own, key=lambda row: hashlib.sha256(str(rows.encounter_ids[row]).encode()).digest())[:cap]] = True
    return keep


def patient_integers(plan: PlanManifest, data: Dataset, weights: Reals) -> list[Reals]:
    """What each training patient adds to the sum."""
    assert plan.privacy is not None
    rows = data.rows(SplitName.TRAIN)
    x, keep = with_intercept(rows), capped(rows, plan.privacy.max_encounters_per_patient)
    gradients = (sigmoid(x @ weights) - rows.y)[:, np.newaxis] * x
    bound = plan.train_sensitivity - math.sqrt(plan.weights_length) / 2
    integers = []
    for patient in range(rows.patients):
        scaled = gradients[keep & (rows.patient == patient)].sum(axis=0) * plan.encoding.scale
        integers.append(np.round(scaled * min(1.0, bound / np.linalg.norm(scaled))))
    return integers


def some_state(plan: PlanManifest, seed: int = 5, size: float = 0.3) -> State:
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(0, size, plan.weights_length).astype(np.float32) for _ in range(3)]
    return State(2, *drawn)


def test_private_contribution_is_the_sum_of_clipped_patient_gradients(cache: Path) -> None:
    data, state = dataset(PLAN, 1), some_state(PLAN)
    vector = Trainer(PLAN, data, cache).contribution(state.to_bytes(), 1)
    expected = sum(patient_integers(PLAN, data, state.weights.astype(np.float64)))
    patients = data.rows(SplitName.TRAIN).patients
    assert vector.dtype == np.int64
    assert vector.shape == (PLAN.vector_length,)
    # float32 against float64: a coordinate of a patient may round to the next integer.
    np.testing.assert_allclose(vector[: PLAN.train_length], expected, atol=patients)
    assert np.abs(vector[: PLAN.train_length]).max() > 50 * patients
    assert not vector[PLAN.train_length :].any()


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(np.full((400, 5), 1e30), id="huge"),
        pytest.param(np.full((400, 5), np.inf), id="infinite"),
        pytest.param(np.full((400, 5), np.nan), id="nan"),
        pytest.param(np.full((400, 5), 1e-30), id="tiny"),
        pytest.param(np.eye(400, 5) * 1e6, id="one-hot"),
        pytest.param(np.tile([1e18, -1e18, 1, 1, 1e18], (400, 1)), id="mixed"),
        pytest.param(np.random.default_rng(0).standard_cauchy((400, 5)) * 1e3, id="heavy-tails"),
    ],
)
def test_no_patient_exceeds_the_sensitivity(cache: Path, hostile: NDArray[np.float64]) -> None:
    state = some_state(PLAN, size=2.0).to_bytes()
    for seed in range(8):
        # One training patient and one validation patient: the vector is the contribution of each.
        data = dataset(PLAN, seed, patients=2, x=hostile[seed:])
        vector = [int(value) for value in Trainer(PLAN, data, cache).contribution(state, 4)]
        train, measured = vector[: PLAN.train_length], vector[PLAN.train_length :]
        assert sum(value * value for value in train) <= PLAN.train_sensitivity**2
        assert sum(value * value for value in measured) <= PLAN.metrics_sensitivity**2
        # A score that is not a number falls in no bin.
        assert any(measured) == bool(np.isfinite(hostile).all())


def test_the_audited_clipping_is_that_of_the_compiled_plan(cache: Path) -> None:
    """`fedmesh bench privacy-audit` clips in NumPy: one-hot canaries and ordinary patients alike."""
    for seed, x in enumerate([np.eye(400, 5) * 1e6, np.random.default_rng(1).normal(0, 30, (400, 5))]):
        data, state = dataset(PLAN, seed, x=x), some_state(PLAN)
        rows = data.rows(SplitName.TRAIN)
        assert PLAN.privacy is not None
        keep = capped(rows, PLAN.privacy.max_encounters_per_patient)
        residual = sigmoid(with_intercept(rows) @ state.weights.astype(np.float64)) - rows.y
        rowwise = residual[:, np.newaxis] * with_intercept(rows) * keep[:, np.newaxis]
        gradients = np.stack([rowwise[rows.patient == number].sum(axis=0) for number in range(rows.patients)])
        compiled = Trainer(PLAN, data, cache).contribution(state.to_bytes(), 1)[: PLAN.train_length]
        # float32 against float64: a coordinate of a patient may round to the next integer.
        np.testing.assert_allclose(compiled, clipped_sum(PLAN, gradients), atol=rows.patients)
        assert np.abs(compiled).max() > 50 * rows.patients


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 100])
def test_parts_of_a_hospital_add_up_to_the_same_integers(cache: Path, chunk: int) -> None:
    """Patients' rows lie in any order; with some chunks the training patients, with others the validation rows last."""
    data, state = dataset(PLAN, 7, patients=41, size=3.0), some_state(PLAN).to_bytes()
    order = np.random.default_rng(chunk).permutation(len(data.y))
    shuffled = Dataset(
        data.feature_names, data.x[order], data.y[order], data.patient[order], data.split[order],
        data.encounter_ids[order], data.patient_ids[order], data.content_sha256, 0, 0, 0,
    )  # fmt: skip
    for number in (1, 4):
        whole = Trainer(PLAN, shuffled, cache, chunk=10_000).contribution(state, number)
        np.testing.assert_array_equal(Trainer(PLAN, shuffled, cache, chunk=chunk).contribution(state, number), whole)
        assert bool(whole[PLAN.train_length :].any()) == (number == 4)


def test_removing_a_patient_moves_the_sum_by_at_most_the_sensitivity(cache: Path) -> None:
    state = some_state(PLAN).to_bytes()
    data = dataset(PLAN, 3, patients=30, size=20.0)
    whole = Trainer(PLAN, data, cache).contribution(state, 4)
    distances = []
    for owner in sorted(set(data.patient_ids)):
        keep = data.patient_ids != owner
        patient = data.patient[keep].copy()
        for side in SplitName:
            mask = data.split[keep] == side
            patient[mask] = np.unique(patient[mask], return_inverse=True)[1]
        fewer = Dataset(
            data.feature_names, data.x[keep], data.y[keep], patient, data.split[keep],
            data.encounter_ids[keep], data.patient_ids[keep], data.content_sha256, 0, 0, 0,
        )  # fmt: skip
        moved = whole - Trainer(PLAN, fewer, cache).contribution(state, 4)
        train, measured = moved[: PLAN.train_length], moved[PLAN.train_length :]
        assert int(train @ train) <= PLAN.train_sensitivity**2
        assert int(measured @ measured) <= PLAN.metrics_sensitivity**2
        # Parts have disjoint patients: only one of them moves.
        assert not (train.any() and measured.any())
        distances.append(int(train @ train))
    assert max(distances) > 0.9 * PLAN.train_sensitivity**2


def test_gradient_descent_update(cache: Path) -> None:
    algorithm = PLAN.algorithm
    assert isinstance(algorithm, GradientDescent)
    trainer, state = Trainer(PLAN, None, cache), some_state(PLAN)
    total = np.arange(-11, PLAN.vector_length - 11, dtype=np.int64) * 1000
    after = read_state(trainer.update(state.to_bytes(), total, 3))
    penalty = np.array([PLAN.network.l2] * 5 + [0.0])
    gradient = total[:6] / PLAN.encoding.scale / algorithm.expected_patients + penalty * state.weights
    velocity = algorithm.momentum * state.velocity + gradient
    weights = state.weights - algorithm.learning_rate * velocity
    assert after.updates == 3
    np.testing.assert_allclose(after.velocity, velocity, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.weights, weights, rtol=1e-5, atol=1e-7)
    # A window of the last 2 of 4 rounds opens with the third update and averages from the fourth.
    np.testing.assert_allclose(after.average, weights, rtol=1e-5, atol=1e-7)
    last = read_state(trainer.update(after.to_bytes(), total, 3))
    np.testing.assert_allclose(last.average, (after.weights + last.weights) / 2, rtol=1e-5, atol=1e-6)


def test_update_reads_residues_and_signed_sums_alike(cache: Path) -> None:
    trainer, state = Trainer(PLAN, None, cache), some_state(PLAN).to_bytes()
    total = np.arange(-11, PLAN.vector_length - 11, dtype=np.int64) * 12345
    assert trainer.update(state, total % (1 << 48), 2) == trainer.update(state, total, 2)


def averaged(plan: PlanManifest, data: Dataset, weights: Reals) -> tuple[Reals, int]:
    algorithm, rows = plan.algorithm, data.rows(SplitName.TRAIN)
    assert isinstance(algorithm, FedAvg)
    x, local, velocity = with_intercept(rows), weights.copy(), np.zeros_like(weights)
    penalty = np.array([plan.network.l2] * (len(weights) - 1) + [0.0])
    for _ in range(algorithm.local_steps):
        velocity = algorithm.momentum * velocity + x.T @ (sigmoid(x @ local) - rows.y) / len(rows.y) + penalty * local
        local = local - algorithm.learning_rate * velocity
    return local, len(rows.y)


def test_federated_averaging_loses_nothing(cache: Path) -> None:
    algorithm = PLAIN.algorithm
    assert isinstance(algorithm, FedAvg)
    parts = [dataset(PLAIN, seed, patients=seed * 10) for seed in (2, 3, 5)]
    trainers = [Trainer(PLAIN, part, cache) for part in parts]
    state = some_state(PLAIN)
    weights = state.weights.astype(np.float64)
    total = np.sum([trainer.contribution(state.to_bytes(), 1) for trainer in trainers], axis=0)
    local = [averaged(PLAIN, part, weights) for part in parts]
    rows = sum(count for _, count in local)
    assert total[PLAIN.train_length - 1] == rows
    mean = sum(values * (count / rows) for values, count in local)
    velocity = algorithm.server_momentum * state.velocity + (weights - mean)
    after = read_state(trainers[0].update(state.to_bytes(), total, 3))
    np.testing.assert_allclose(after.weights, weights - velocity, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.average, after.weights)


def test_training_lowers_the_loss(cache: Path) -> None:
    data = dataset(PLAIN, 8, patients=200)
    signal = (data.x[:, 0] > 0.5).astype(np.float32)
    learnable = Dataset(**{**vars(data), "y": signal})
    trainer = Trainer(PLAIN, learnable, cache)
    state, losses = trainer.initial_state(), []
    for number in range(1, 5):
        total = trainer.contribution(state, number)
        losses.append(trainer.metrics(total)["loss"])
        state = trainer.update(state, total, 1)
    assert all(loss is not None for loss in losses)
    assert losses == sorted(losses, reverse=True)  # type: ignore[type-var]
    auroc = trainer.metrics(trainer.contribution(state, 4))["auroc"]
    assert auroc is not None
    assert auroc > 0.95


def test_metrics_agree_with_the_scores(cache: Path) -> None:
    data, state = dataset(PLAIN, 4, patients=300), some_state(PLAIN)
    trainer = Trainer(PLAIN, data, cache)
    found = trainer.metrics(trainer.contribution(state.to_bytes(), 1))
    rows = data.rows(SplitName.VALIDATION)
    scores = predict(PLAIN, state.to_bytes(), rows.x)
    positive, negative = scores[rows.y == 1], scores[rows.y == 0]
    pairs = positive[:, np.newaxis] - negative
    auroc = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    loss = -np.mean(np.log(np.where(rows.y == 1, scores, 1 - scores)))
    assert (found["positives"], found["negatives"]) == (len(positive), len(negative))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    # 32 bins: ties within a bin count half.
    assert found["auroc"] == pytest.approx(auroc, abs=0.01)
    order = np.argsort(-scores)
    hits = np.cumsum(rows.y[order])
    precision = (hits / np.arange(1, len(hits) + 1))[rows.y[order] == 1].mean()
    assert found["auprc"] == pytest.approx(precision, abs=0.04)


def test_noised_metrics_stay_in_range(cache: Path) -> None:
    trainer = Trainer(PLAN, None, cache)
    rng = np.random.default_rng(0)
    for size in (1, 100, 10_000):
        for _ in range(50):
            total = rng.normal(0, size, PLAN.vector_length).astype(np.int64)
            found = trainer.metrics(total)
            for name in ("auroc", "auprc"):
                assert found[name] is None or 0 <= found[name] <= 1  # type: ignore[operator]
            assert found["loss"] is None or math.isfinite(found["loss"])
    assert set(trainer.metrics(np.zeros(PLAN.vector_length, dtype=np.int64)).values()) == {None}


def test_repeats_bit_by_bit(cache: Path) -> None:
    data, state = dataset(PLAIN, 6, patients=300), some_state(PLAIN).to_bytes()
    first, second = Trainer(PLAIN, data, cache), Trainer(PLAIN, data, cache)
    total = first.contribution(state, 1)
    assert (first.contribution(state, 1) == total).all()
    assert (second.contribution(state, 1) == total).all()
    assert first.update(state, total, 1) == second.update(state, total, 1)


def test_divergence_is_an_error_not_a_plausible_vector(cache: Path) -> None:
    trainer = Trainer(PLAIN, dataset(PLAIN, 6, size=1e25), cache)
    with pytest.raises(FedmeshError, match="diverged") as caught:
        trainer.contribution(trainer.initial_state(), 1)
    assert caught.value.code is Code.WRONG_STATE


def test_wrong_arguments(cache: Path) -> None:
    trainer = Trainer(PLAN, None, cache)
    state, total = trainer.initial_state(), np.zeros(PLAN.vector_length, dtype=np.int64)
    wrong: list[tuple[Any, Any, int]] = [(state, total[1:], 1), (state, total.astype(np.int32), 1), (state, total, 0)]
    wrong += [(b"", total, 1), (state[:-1], total, 1), (b"X" + state[1:], total, 1)]
    for bad_state, bad_total, contributors in wrong:
        with pytest.raises(FedmeshError) as caught:
            trainer.update(bad_state, bad_total, contributors)
        assert caught.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(FedmeshError, match="no data set"):
        trainer.contribution(state, 1)
    with pytest.raises(FedmeshError, match="another plan"):
        Trainer(PLAN, Dataset(**{**vars(dataset(PLAN, 1)), "feature_names": ("a",)}), cache)
    with pytest.raises(FedmeshError, match="features, not"):
        trainer.predict(state, np.zeros((3, 2), dtype=np.float32))


def test_states() -> None:
    state = initial_state(PLAN)
    assert state == initial_state(PLAN)
    assert read_state(state, PLAN).weights.tolist() == [0, 0, 0, 0, 0, -1]
    assert read_state(state).to_bytes() == state
    one = some_state(PLAN)
    near = State(one.updates, one.weights * np.float32(1 + 1e-6), one.velocity, one.average)
    far = State(one.updates, one.weights + np.float32(1e-2), one.velocity, one.average)
    later = State(one.updates + 1, one.weights, one.velocity, one.average)
    assert states_close(one.to_bytes(), near.to_bytes())
    assert not states_close(one.to_bytes(), far.to_bytes())
    assert not states_close(one.to_bytes(), later.to_bytes())
    infinite = State(1, one.weights * np.float32(np.inf), one.velocity, one.average)
    with pytest.raises(FedmeshError, match="not finite"):
        read_state(infinite.to_bytes())


def test_segments_cover_what_is_released() -> None:
    assert [part.name for part in segments(PLAN, 1)] == ["train"]
    train, metrics = segments(PLAN, 4)
    assert (train.slice, metrics.slice) == (slice(0, 6), slice(6, 22))
    assert (train.sensitivity, metrics.sensitivity) == (PLAN.train_sensitivity, PLAN.metrics_sensitivity)
