"""Personal models: the optimum by independent conditions, and never worse than the shared model where it is judged."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset, Rows, SplitName
from services.hospital_node.training.personal import nearest, personalise
from services.hospital_node.training.state import State, read_state
from services.hospital_node.training.trainer import Trainer, predict
from services.plans.manifest import PlanManifest
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, dataset, manifest

PLAN = manifest(FEDAVG)
PRIVATE_PLAN = manifest({**PRIVATE, "personalisation": {"proximal_weights": [1, 0.1]}})


def state(plan: PlanManifest, seed: int, size: float = 0.5) -> bytes:
    """Weights differ from the average, which is the model that is served."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(0, size, plan.weights_length).astype(np.float32) for _ in range(3)]
    return State(7, *drawn).to_bytes()


def following(plan: PlanManifest, weights: NDArray[np.float64], seed: int) -> Dataset:
    """Outcomes that follow a logistic model with these weights (intercept last)."""
    given, rng = dataset(plan, seed, patients=120), np.random.default_rng(seed)
    probability = 1 / (1 + np.exp(-(given.x @ weights[:-1] + weights[-1])))
    given.y[:] = rng.random(len(given.y)) < probability
    return given


def sides(given: Dataset) -> tuple[Rows, Rows]:
    return given.rows(SplitName.TRAIN), given.rows(SplitName.VALIDATION)


def judged(plan: PlanManifest, model: bytes, rows: Rows) -> tuple[float, float]:
    """Mean log loss and accuracy by way of the predictions."""
    probability = predict(plan, model, rows.x)
    likelihood = np.where(rows.y > 0.5, probability, 1 - probability)
    return float(-np.log(likelihood).mean()), float(((probability > 0.5) == (rows.y > 0.5)).mean())


@pytest.mark.parametrize("plan", [PLAN, PRIVATE_PLAN], ids=["without privacy", "with privacy"])
def test_a_hospital_that_differs_gets_a_model_of_its_own(plan: PlanManifest) -> None:
    shared = state(plan, 1)
    own = -3 * read_state(shared).average.astype(np.float64)
    train, validation = sides(following(plan, own, 2))
    model = personalise(plan, shared, train, validation)
    before, after = judged(plan, shared, validation), judged(plan, model, validation)
    assert after[0] < before[0] - 0.1
    assert after[1] > before[1] + 0.1
    assert read_state(model, plan).updates == 7


def test_never_worse_on_the_validation_rows() -> None:
    """Also where outcomes are noise, so that whatever is learnt from the training rows is wrong."""
    kept = moved = 0
    for seed in range(60):
        shared = state(PLAN, seed, size=0.2)
        train, validation = sides(dataset(PLAN, seed, patients=24))
        model = personalise(PLAN, shared, train, validation)
        before, after = judged(PLAN, shared, validation), judged(PLAN, model, validation)
        if model == shared:
            kept += 1
        else:
            moved += 1
            assert after[0] < before[0]
            assert after[1] >= before[1]
    assert min(kept, moved) > 5, "both happen, so both are tested"


def test_the_shared_model_stays_where_validation_says_the_opposite() -> None:
    given = following(PLAN, np.full(PLAN.weights_length, 2.0), 4)
    aside = given.split == SplitName.VALIDATION
    given.y[aside] = 1 - given.y[aside]
    shared = State(1, *[np.zeros(PLAN.weights_length, dtype=np.float32)] * 3).to_bytes()
    assert personalise(PLAN, shared, *sides(given)) == shared


def test_without_validation_rows_there_is_nothing_to_choose_by() -> None:
    given, shared = dataset(PLAN, 5), state(PLAN, 5)
    train, _ = sides(given)
    assert personalise(PLAN, shared, train, given.rows(SplitName.TEST)) == shared
    assert personalise(PLAN, shared, given.rows(SplitName.TEST), train) == shared


@pytest.mark.parametrize("proximal", [1e3, 1.0, 1e-3])
@pytest.mark.parametrize("outcomes", ["mixed", "all the same", "separable"])
def test_nearest_is_the_minimum(proximal: float, outcomes: str) -> None:
    """The gradient, by central differences of an objective written anew, is zero there."""
    rng = np.random.default_rng(9)
    x = np.concatenate([rng.normal(size=(50, 4)) * [1, 5, 0.1, 1], np.ones((50, 1))], axis=1)
    signs = {"mixed": np.sign(rng.normal(size=50)), "all the same": np.ones(50), "separable": np.sign(x[:, 0])}[
        outcomes
    ]
    centre, start = rng.normal(size=5), rng.normal(size=5) * 4
    found = nearest(x, signs, centre, proximal, start)

    def objective(weights: NDArray[np.float64]) -> float:
        return float(
            -np.log(1 / (1 + np.exp(-signs * (x @ weights)))).mean() + proximal / 2 * np.sum((weights - centre) ** 2)
        )

    steps = np.eye(5) * 1e-5
    slope = [(objective(found + step) - objective(found - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(slope, 0, atol=1e-6 * max(1.0, proximal))


def test_a_state_of_another_plan_is_refused() -> None:
    other = State(1, *[np.zeros(3, dtype=np.float32)] * 3).to_bytes()
    with pytest.raises(FedmeshError) as caught:
        personalise(PLAN, other, *sides(dataset(PLAN, 1)))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_trainer_makes_it_from_its_own_rows(cache: Path) -> None:
    given, shared = following(PLAN, np.full(PLAN.weights_length, 1.5), 6), state(PLAN, 6)
    model = Trainer(PLAN, given, cache).personalise(shared)
    assert model == personalise(PLAN, shared, *sides(given)) != shared
    for trainer in (Trainer(PLAN, None, cache), Trainer(manifest(PRIVATE), dataset(manifest(PRIVATE), 1), cache)):
        with pytest.raises(FedmeshError) as caught:
            trainer.personalise(shared)
        assert caught.value.code is Code.WRONG_STATE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"proximal_weights": []}, "at least 1 item"),
        ({"proximal_weights": [0]}, "greater than or equal to 0.000001"),
        ({"proximal_weights": [0.1, 1, 0.1]}, "a weight appears twice"),
        ({"proximal_weights": [1], "steps": 3}, "unknown field personalisation.steps"),
        ({}, "proximal_weights"),
    ],
)
def test_a_plan_must_state_it_properly(value: object, message: str) -> None:
    with pytest.raises(FedmeshError, match=message) as caught:
        manifest(changed(FEDAVG, "personalisation", value))
    assert caught.value.code is Code.PLAN_INVALID


def test_plans_make_no_personal_models_unless_they_say_so() -> None:
    assert manifest(PRIVATE).personalisation is None
    document = {**FEDAVG, "model": {"family": "integer_vector", "length": 8}, "algorithm": {"kind": "sum_only"}}
    with pytest.raises(FedmeshError, match="personalisation must be null"):
        manifest(document)
