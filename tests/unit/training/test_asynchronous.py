"""The compiled plan in asynchronous rounds, with local steps by speed. Compiles a plan of its own: slow."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.domain.staleness import Trained, contribution
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.training.state import read_state
from services.hospital_node.training.trainer import Trainer
from services.plans.manifest import PlanManifest
from tests.support.asynchronous_learning import Course, run
from tests.support.tiny_plan import FEDAVG, changed, dataset, manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

HOSPITALS = 5
PACES = (1.0, 1.1, 1.2, 1.3, 5.0)
COUNT = 16


def plan(asynchronous: bool, target_s: float | None) -> PlanManifest:
    rounds = {"mode": "asynchronous", "k": 4, "max_age": 8} if asynchronous else {}
    document = changed(FEDAVG, "rounds", {"count": COUNT, **rounds})
    return manifest(changed(document, "algorithm.target_s", target_s))


def learnable(made: PlanManifest, number: int) -> Dataset:
    """Rows whose outcome follows from two of their features, with chance."""
    rows = dataset(made, number, patients=80)
    odds = 2.0 * rows.x[:, 0] - rows.x[:, 1] - 0.5
    drawn = np.random.default_rng(100 + number).random(len(odds))
    return replace(rows, y=(drawn < 1 / (1 + np.exp(-odds))).astype(np.float32))


def trainers(made: PlanManifest, cache: Path) -> list[Trainer]:
    return [Trainer(made, learnable(made, number), cache) for number in range(HOSPITALS)]


def course(made: PlanManifest, cache: Path) -> Course:
    hospitals = trainers(made, cache)

    def train(number: int, state: bytes) -> Int64Vector:
        return hospitals[number].contribution(state, COUNT)

    return run(made, PACES, hospitals[0].initial_state(), train, hospitals[0].update)


def loss(made: PlanManifest, cache: Path, state: bytes) -> float:
    hospitals = trainers(made, cache)
    total = np.sum([hospital.contribution(state, COUNT) for hospital in hospitals], axis=0)
    measured = hospitals[0].metrics(total)["loss"]
    assert measured is not None
    return measured


def test_real_plans_reach_about_the_same_loss(tmp_path: Path) -> None:
    fixed, paced = plan(False, None), plan(True, 1e-3)
    synchronous, asynchronous = course(fixed, tmp_path), course(paced, tmp_path)
    start = loss(fixed, tmp_path, trainers(fixed, tmp_path)[0].initial_state())
    reached = [loss(fixed, tmp_path, made.state) for made in (synchronous, asynchronous)]
    assert start - reached[0] > 0.05
    assert abs(reached[1] - reached[0]) < 0.03
    assert read_state(asynchronous.state).updates == COUNT
    assert any(age > 0 for group in asynchronous.ages for age in group.values())


def test_weights_of_equal_age_shorten_the_step_and_fresh_ones_do_not(tmp_path: Path) -> None:
    weighted, plain = plan(True, None), plan(False, None)
    hospital, other = Trainer(weighted, dataset(weighted, 1), tmp_path), Trainer(plain, dataset(plain, 1), tmp_path)
    start = hospital.initial_state()
    values = other.contribution(start, COUNT)
    trained = Trained(0, values)
    step = functools.partial(contribution, weighted, trained, round_number=COUNT)
    before = read_state(start).weights
    fresh = read_state(hospital.update(start, step(age=0), 1)).weights - before
    old = read_state(hospital.update(start, step(age=3), 1)).weights - before
    synchronous = read_state(other.update(start, values, 1)).weights - before
    assert fresh == pytest.approx(synchronous, rel=1e-5)
    assert old == pytest.approx(fresh / 2, rel=1e-5)
