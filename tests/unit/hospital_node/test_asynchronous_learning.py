"""Asynchronous training learns as synchronous training does, and sooner where one hospital is slow."""

import functools

import numpy as np
from numpy.typing import NDArray

from services.hospital_node.domain.ports import Int64Vector
from services.plans.algorithms import GradientDescent
from services.plans.manifest import PlanManifest
from tests.support.asynchronous_learning import Course, run
from tests.support.tiny_plan import PRIVATE, changed, manifest

HOSPITALS, PATIENTS = 6, 80
PACES = (1.0, 1.0, 1.1, 1.2, 1.3, 4.0)
Reals = NDArray[np.float64]


def plan(asynchronous: bool, max_age: int = 6) -> PlanManifest:
    """Gradient descent without noise, whose step divides by the patients that a group is expected to have."""
    group = 4 if asynchronous else HOSPITALS
    rounds = {"mode": "asynchronous", "k": group, "max_age": max_age} if asynchronous else {}
    document = changed(PRIVATE, "rounds", {"count": 60, **rounds})
    document = changed(changed(document, "privacy", None), "metrics", None)
    return manifest(changed(document, "algorithm.expected_patients", group * PATIENTS))


@functools.cache
def data(number: int) -> tuple[Reals, Reals]:
    """Rows of one hospital; the last coordinate is the intercept. Hospitals differ in their outcomes."""
    width = plan(False).weights_length
    rng = np.random.default_rng(number)
    x = np.concatenate([rng.normal(size=(PATIENTS, width - 1)), np.ones((PATIENTS, 1))], axis=1)
    slope = np.linspace(1.5, -1.0, width) + 0.2 * number / HOSPITALS
    return x, (rng.random(PATIENTS) < 1 / (1 + np.exp(-x @ slope))).astype(np.float64)


def loss(state: bytes) -> float:
    weights = np.frombuffer(state)
    each = [np.logaddexp(0, (1 - 2 * y) * (x @ weights)).mean() for x, y in map(data, range(HOSPITALS))]
    return float(np.mean(each))


def train(made: PlanManifest, number: int, state: bytes) -> Int64Vector:
    x, y = data(number)
    residual = 1 / (1 + np.exp(-x @ np.frombuffer(state))) - y
    integers: Int64Vector = np.round(residual @ x * made.encoding.scale).astype(np.int64)
    return integers


def update(made: PlanManifest, state: bytes, total: Int64Vector, _contributors: int) -> bytes:
    """One step without momentum, as the compiled plan takes it."""
    algorithm = made.algorithm
    assert isinstance(algorithm, GradientDescent)
    mean = total / (made.encoding.scale * made.weight_units) / algorithm.expected_patients
    return bytes((np.frombuffer(state) - algorithm.learning_rate * mean).tobytes())


def course(made: PlanManifest) -> Course:
    start = np.zeros(made.weights_length).tobytes()
    return run(made, PACES, start, functools.partial(train, made), functools.partial(update, made))


def test_the_loss_is_that_of_synchronous_rounds_in_less_time() -> None:
    synchronous, asynchronous = course(plan(False)), course(plan(True))
    before = loss(np.zeros(plan(False).weights_length).tobytes())
    assert before - loss(synchronous.state) > 0.1
    assert abs(loss(asynchronous.state) - loss(synchronous.state)) < 0.01
    assert asynchronous.ended < synchronous.ended / 2
    ages = [age for group in asynchronous.ages for age in group.values()]
    assert max(ages) > 0
    assert any(HOSPITALS - 1 in group for group in asynchronous.ages), "the slow hospital contributes"


def test_a_bound_that_is_too_strict_leaves_the_slow_hospital_out() -> None:
    strict = course(plan(True, max_age=1))
    assert max(age for group in strict.ages for age in group.values()) == 1
    assert not any(HOSPITALS - 1 in group for group in strict.ages)
