"""The measuring round: what a hospital adds to it, how it is noised, and what follows from its sum."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import compositions, plan_loss
from services.hospital_node.domain.ports import NoiseRequest
from services.hospital_node.noise import ShareOfNoise, mechanisms
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.training.attack import LENGTH, Attacks, Scored, packed
from services.hospital_node.training.checking import MOST_ROWS, find, rows_of
from services.hospital_node.training.metrics import auroc
from services.hospital_node.training.trainer import Trainer, segments
from services.plans.manifest import PlanManifest, plan_id
from tests.support.family_plans import DOCUMENTS
from tests.support.tiny_plan import PRIVATE, dataset, manifest
from tests.unit.training.test_trainer import some_state

CHECKS: dict[str, Any] = {
    "least_subgroup_count": 5,
    "largest_attack_auc": 0.6,
    "largest_subgroup_gap": 0.1,
    "subgroups": [{"column": "ward"}, {"column": "age", "bands": [40, 65]}],
}
PLAN = manifest({**PRIVATE, "rounds": {"count": 5}, "checks": CHECKS})
MLP = manifest({**DOCUMENTS["mlp-private"], "name": "mlp-private", "rounds": {"count": 5}, "checks": CHECKS})
BINS = 8
UNITS = PLAN.encoding.metrics_units
WARDS, AGES = 3, 3


def grouped(seed: int = 1, **changes: Any) -> Dataset:
    data = dataset(PLAN, seed, **changes)
    rng = np.random.default_rng(seed)
    return replace(data, groups=np.stack([rng.integers(0, n, len(data.y)) for n in (WARDS, AGES)], axis=1))


def parts(plan: PlanManifest, vector: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(metrics, groups, members): counts, each [..., 2, bins]."""
    counts = vector[plan.train_length :].reshape(-1, 2, BINS) / plan.encoding.metrics_units
    return counts[0], counts[1:-1], counts[-1]


def test_the_plan_trains_as_without_checks() -> None:
    assert plan_id(PLAN.without_checks) == plan_id(manifest(PRIVATE))
    assert (PLAN.measuring_round, PLAN.metrics_rounds) == (5, (2, 4, 5))
    assert PLAN.groups == (
        *(("ward", name) for name in ("a", "heart", "others")),
        *(("age", name) for name in ("below-40", "40-to-65", "from-65")),
    )


@pytest.mark.parametrize("plan", [PLAN, MLP], ids=["logistic", "mlp"])
def test_the_measuring_round_counts_each_encounter_once_in_every_part(cache: Path, plan: PlanManifest) -> None:
    data = grouped()
    state = some_state(plan.without_checks)
    trainer = Trainer(plan, data, cache)
    vector = trainer.contribution(state.to_bytes(), 5)
    assert vector.shape == (plan.vector_length,)
    assert not vector[: plan.train_length].any()
    metrics, groups, members = parts(plan, vector)
    # One encounter of each validation patient, two of each training patient at most.
    assert metrics.sum() == data.rows(SplitName.VALIDATION).patients
    for column, last in ((groups[:WARDS], WARDS), (groups[WARDS:], AGES)):
        assert len(column) == last
        np.testing.assert_array_equal(column.sum(axis=0), metrics)
    rows = data.rows(SplitName.TRAIN)
    _, encounters = np.unique(rows.patient, return_counts=True)
    assert members.sum() == np.minimum(encounters, 2).sum()
    # In the other rounds these parts are zero, whatever the data.
    for number in (1, 4):
        other = trainer.contribution(state.to_bytes(), number)
        assert not other[plan.train_length + plan.metrics_length :].any()
        assert other[: plan.train_length].any()


def test_no_patient_exceeds_the_sensitivity_of_its_part(cache: Path) -> None:
    state = some_state(PLAN.without_checks, size=2.0).to_bytes()
    validation, members = segments(PLAN, 5)
    assert (validation.sensitivity, members.sensitivity) == (PLAN.measured_sensitivity, PLAN.members_sensitivity)
    for seed in range(6):
        # One training patient and one validation patient: each part is the contribution of one of them.
        data = grouped(seed, patients=2, size=30.0)
        vector = [int(value) for value in Trainer(PLAN, data, cache).contribution(state, 5)]
        for part in (validation, members):
            square = sum(value * value for value in vector[part.slice])
            assert 0 < square <= part.sensitivity**2
    # Three histograms of one encounter: the bound is reached, up to rounding up.
    assert PLAN.measured_sensitivity == int(np.ceil(UNITS * np.sqrt(3)))
    assert PLAN.members_sensitivity == 2 * UNITS


def test_the_measuring_round_is_noised_as_one_more_release_of_each_part() -> None:
    assert PLAN.privacy is not None
    assert compositions(PLAN) == (5 + 1, 3 + 1)
    assert plan_loss(PLAN) == plan_loss(manifest(PRIVATE))
    [(train, gradient)] = mechanisms(NoiseRequest(PLAN, 1, 5))
    (validation, measured), (rest, members) = mechanisms(NoiseRequest(PLAN, 5, 5))
    assert (train.stop, validation.start, validation.stop, rest.stop) == (
        PLAN.train_length,
        PLAN.train_length,
        rest.start,
        PLAN.vector_length,
    )
    assert (members.compositions, measured.compositions) == (gradient.compositions, 4)
    ratio = members.noise().noise_multiplier / gradient.noise().noise_multiplier
    assert ratio == pytest.approx(1.0, abs=1e-9)
    noised = ShareOfNoise().add(np.zeros(PLAN.vector_length, dtype=np.int64), NoiseRequest(PLAN, 5, 5))
    assert not noised[: PLAN.train_length].any()
    assert noised[validation].any()
    assert noised[rest].any()


def summed(everybody: Any, groups: Any, members: Any) -> NDArray[np.int64]:
    vector: NDArray[np.int64] = np.concatenate([np.ravel(part) for part in (everybody, groups, members)]) * UNITS
    return vector.astype(np.int64)


def spread(positive: int, negative: int) -> NDArray[np.float64]:
    """Counts [2, bins] with all positives in one bin and all negatives in another."""
    counts = np.zeros((2, BINS))
    counts[0, positive], counts[1, negative] = 40, 60
    return counts


def below(low: NDArray[np.float64], high: NDArray[np.float64]) -> float:
    """Probability that one of `low` is below one of `high`; ties count half (Mann-Whitney)."""
    pairs = low[:, np.newaxis] - high[np.newaxis]
    return float((np.sign(-pairs) / 2 + 0.5).mean())


def test_the_attack_on_histograms_is_the_area_under_their_curve(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # As an opened sum has them: with noise, in whole units, which are parts of encounters.
    inside, outside = (np.maximum(np.rint(rng.normal(80.0, 60.0, (2, BINS))), 0.0) for _ in range(2))
    members, others = rows_of(PLAN, inside / UNITS), rows_of(PLAN, outside / UNITS)
    found = {one.rows: one for one in Attacks(tmp_path / "lock").run(("threshold",), members, others)}
    order = np.arange(BINS).astype(float)
    for name, row, losses in (("positives", 0, -order), ("negatives", 1, order)):
        low, high = (np.repeat(losses, counts[row].astype(int)) for counts in (inside, outside))
        assert found[name].auc == pytest.approx(below(low, high), abs=1e-12)
        assert (found[name].train_rows, found[name].validation_rows) == (len(low), len(high))
        # As one computes it from the bins themselves.
        bins = ((counts[row] if row else counts[row][::-1]) for counts in (outside, inside))
        assert found[name].auc == pytest.approx(auroc(*bins), abs=1e-12)
    low, high = (np.logaddexp(0.0, np.where(side.outcomes == 1, -1.0, 1.0) * side.scores) for side in (members, others))
    assert found["all"].auc == pytest.approx(below(low, high), abs=1e-12)


def test_a_sum_cannot_claim_more_rows_than_memory_holds() -> None:
    counts = spread(5, 3)
    counts[0, 5:7] = 2.0**40, 2.0**38
    rows = rows_of(PLAN, counts)
    positives = np.unique(rows.scores[rows.outcomes == 1], return_counts=True)[1]
    np.testing.assert_allclose(positives, [MOST_ROWS * 0.8, MOST_ROWS * 0.2], atol=1)
    assert (rows.outcomes == 0).sum() == counts[1].sum() * UNITS


@pytest.mark.parametrize("plan", [PLAN, MLP], ids=["logistic", "mlp"])
def test_a_hospital_attacks_its_own_rows(cache: Path, plan: PlanManifest) -> None:
    data = grouped(3, patients=400)
    state = some_state(plan.without_checks)
    trainer = Trainer(plan, data, cache)
    before = trainer.contribution(state.to_bytes(), 5)
    found = trainer.attack(state.to_bytes())
    assert trainer.attack(state.to_bytes()) == found
    np.testing.assert_array_equal(trainer.contribution(state.to_bytes(), 5), before)
    attacks = [(one.attack, one.rows) for one in found]
    rows = ("all", "negatives", "positives")
    assert sorted(attacks) == [(kind, name) for kind in ("logistic-regression", "threshold") for name in rows]
    # One encounter of each patient, as many as the validation patients have.
    everybody = next(one for one in found if (one.attack, one.rows) == ("threshold", "all"))
    train, validation = data.rows(SplitName.TRAIN), data.rows(SplitName.VALIDATION)
    assert (everybody.train_rows, everybody.validation_rows) == (train.patients, validation.patients)
    assert all(0.0 <= one.auc <= 1.0 and 0.0 <= one.advantage <= 1.0 for one in found)


def test_a_model_that_learnt_its_rows_by_heart_is_found_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    outcomes = rng.integers(0, 2, 300)
    sure, unsure = np.where(outcomes == 1, 6.0, -6.0), rng.normal(0.0, 1.0, 300)
    attacks = Attacks(tmp_path / "lock")
    found = attacks.run(("threshold", "logistic-regression"), Scored(sure, outcomes), Scored(unsure, outcomes), 20)
    assert len(found) == 6
    assert all(one.auc > 0.99 and one.advantage > 0.95 for one in found)
    assert attacks.run(("threshold",), Scored(sure[:19], outcomes[:19]), Scored(unsure, outcomes), 20) == ()
    # Of one outcome only, and constant scores: nothing to tell apart.
    alike = Scored(np.zeros(40), np.zeros(40, dtype=np.int64))
    found = attacks.run(("threshold",), alike, alike, 20)
    assert {(one.rows, one.auc) for one in found} == {("all", 0.5), ("negatives", 0.5)}


def test_an_attack_that_fails_says_so(tmp_path: Path) -> None:
    broken = Scored(np.zeros(30), np.zeros(20, dtype=np.int64))
    with pytest.raises(FedmeshError) as caught:
        Attacks(tmp_path / "lock").run(("threshold",), broken, broken, 1)
    assert caught.value.code is Code.INTERNAL
    assert "ValueError" in caught.value.message


def test_the_process_ends_when_nobody_waits_for_it() -> None:
    command = [sys.executable, "-m", "services.hospital_node.training.attack_process"]
    rows = Scored(np.linspace(-1.0, 1.0, 400), np.tile([0, 1], 200))
    request = packed(("threshold",), rows, rows, 1)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        # Closes its input, as the death of the node does.
        output, _ = process.communicate(LENGTH.pack(len(request)) + request)
    assert (process.returncode, output) == (1, b"")


def test_a_node_imports_nothing_of_the_attacks() -> None:
    script = (
        "import sys, services.hospital_node.training.trainer, services.hospital_node.local, services.cli.hospital\n"
        "print([name for name in ('pandas', 'sklearn', 'statsmodels', 'matplotlib', 'tensorflow_privacy')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_what_hospitals_find_in_a_sum(tmp_path: Path) -> None:
    attacks = Attacks(tmp_path / "lock")
    everybody = spread(5, 3) + spread(3, 5) + 3 * spread(5, 2)
    groups = np.stack([everybody / 3] * WARDS + [everybody, np.zeros_like(everybody), everybody / 9])
    good = {
        item.check: item for item in find(PLAN, {1: 0.1, 5: 0.01}, summed(everybody, groups, 2 * everybody), attacks)
    }
    assert [item.passed for item in good.values()] == [True] * 3
    assert good["membership-inference"].figures == {"auc_positives": 0.5, "auc_negatives": 0.5}
    assert good["saturation"].figures == {"peak": 0.1, "rounds_seen": 2.0}
    # The empty age band is too small to judge; its column has others.
    assert "5 of 6 groups" in good["subgroups"].reason

    # Members whose positives all score high and negatives low: the model has learnt them by heart.
    leaky = {item.check: item for item in find(PLAN, {5: 0.1}, summed(everybody, groups, 9 * spread(7, 0)), attacks)}
    assert (leaky["membership-inference"].passed, leaky["subgroups"].passed) == (False, True)
    assert leaky["membership-inference"].figures["auc_positives"] == 1.0

    unfair = groups.copy()
    unfair[1] = spread(2, 5)
    found = {item.check: item for item in find(PLAN, {5: 0.6}, summed(everybody, unfair, everybody), attacks)}
    assert (found["saturation"].passed, found["subgroups"].passed) == (False, False)
    assert "AUROC of ward=heart is 0.0000" in found["subgroups"].reason

    nothing = find(PLAN, {}, summed(0 * everybody, 0 * groups, 0 * everybody), attacks)
    assert [item.passed for item in nothing] == [False] * 3
    assert "too few" in nothing[1].reason
