"""Asynchronous rounds in a plan: weights, what is required, what is refused."""

import json
import math

import pytest

from services.common.errors import Code, FedmeshError
from services.plans.document import canonical_json
from services.plans.manifest import parse_manifest, plan_id
from services.plans.staleness import MAX_AGE, WEIGHT_UNITS, weight_units
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, manifest, reparsed, wire

ROUNDS = {"count": 4, "mode": "asynchronous", "k": 3, "max_age": 2}
ASYNCHRONOUS = changed(PRIVATE, "rounds", ROUNDS)


def test_weights_are_the_floor_of_the_reciprocal_root_and_never_more_than_one() -> None:
    assert [weight_units(age) for age in range(4)] == [64, 45, 36, 32]
    for age in range(MAX_AGE + 1):
        exact = WEIGHT_UNITS / math.sqrt(1 + age)
        assert 0 < weight_units(age) <= exact < weight_units(age) + 1
    assert max(map(weight_units, range(MAX_AGE + 1))) == WEIGHT_UNITS


def test_sensitivity_is_that_of_weight_one_whatever_the_age() -> None:
    plan, before = manifest(ASYNCHRONOUS), manifest(PRIVATE)
    assert plan.train_sensitivity == before.train_sensitivity
    assert plan.summed_sensitivity == WEIGHT_UNITS * plan.train_sensitivity
    assert before.summed_sensitivity == before.train_sensitivity
    assert plan.metrics_sensitivity == before.metrics_sensitivity
    assert reparsed(plan) == plan


def test_synchronous_plans_keep_their_spelling() -> None:
    """A plan that a registry holds from before has no `k`, and its id is the SHA-256 of what it holds."""
    for document in (PRIVATE, FEDAVG):
        plan = manifest(document)
        spelled = json.loads(canonical_json(plan))
        assert set(spelled["rounds"]) == {"count", "mode", "phase_deadline_s", "ready_deadline_s"}
        assert "target_s" not in spelled["algorithm"]
        assert parse_manifest(canonical_json(plan)) == plan
    assert plan_id(manifest(ASYNCHRONOUS)) != plan_id(manifest(PRIVATE))


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ({"count": 4, "mode": "asynchronous"}, "k and max_age are required"),
        ({"count": 4, "mode": "asynchronous", "k": 3}, "k and max_age are required"),
        ({"count": 4, "k": 3}, "must be null for mode = 'synchronous'"),
        ({"count": 4, "mode": "synchronous", "max_age": 1}, "must be null for mode = 'synchronous'"),
        ({**ROUNDS, "k": 0}, "rounds.k = 0"),
        ({**ROUNDS, "max_age": -1}, "rounds.max_age = -1"),
        ({**ROUNDS, "max_age": MAX_AGE + 1}, f"less than or equal to {MAX_AGE}"),
        ({**ROUNDS, "mode": "sometimes"}, "'asynchronous'"),
    ],
)
def test_what_a_plan_cannot_ask_for(rounds: dict[str, object], expected: str) -> None:
    with pytest.raises(FedmeshError) as caught:
        parse_manifest(wire(changed(PRIVATE, "rounds", rounds)))
    assert caught.value.code is Code.PLAN_INVALID
    assert expected in caught.value.message


def test_weights_take_bits_of_a_lane() -> None:
    """Sums up to 2 * 64 * sensitivity * patients must fit."""
    before, after = (changed(document, "encoding.scale", 1 << 20) for document in (PRIVATE, ASYNCHRONOUS))
    largest = 2**47 // (2 * manifest(before).train_sensitivity)
    fits = changed(after, "algorithm.expected_patients", largest // WEIGHT_UNITS)
    assert manifest(fits).weight_units == WEIGHT_UNITS
    with pytest.raises(FedmeshError, match="is too large: sums up to"):
        manifest(changed(after, "algorithm.expected_patients", largest // WEIGHT_UNITS + 1))
    assert manifest(changed(before, "algorithm.expected_patients", largest)).weight_units == 1
