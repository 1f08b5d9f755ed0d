"""What the demonstration says of checks: the figure that decided, and what the measurement costs."""

import json

import pytest
from fedmesh.registry.v1 import promotion_pb2 as pm

from services.demo.promotion import Promotion, judged
from services.hospital_node.domain.ports import NoiseRequest
from services.hospital_node.noise import mechanisms, training_noise
from services.plans.library import shipped_plan

PLAN = shipped_plan("readmission-logistic-private")
HOSPITALS = 15
MOST = False
LEAST = True


def check(name: str, figures: dict[str, float], *signed_by: str, passed: bool = True) -> pm.Check:
    return pm.Check(
        check=name,
        outcome=pm.CHECK_OUTCOME_PASSED if passed else pm.CHECK_OUTCOME_FAILED,
        figures_json=json.dumps(figures),
        made_by="hospitals" if signed_by else "registry",
        signed_by=signed_by,
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (check("quorum", {"least": 12, "needed": 11}), (12, 11, LEAST)),
        (check("convergence", {"first_auroc": 0.6, "last_auroc": 0.65, "least_auroc": 0.5}), (0.65, 0.5, LEAST)),
        (check("divergence", {"largest_fall": 0.01, "allowed": 0.25}), (0.01, 0.25, MOST)),
        (check("divergence", {}, passed=False), (None, None, MOST)),
        (check("saturation", {"peak": 0.1, "rounds_seen": 12}, "a"), (0.1, 0.5, MOST)),
        (check("membership-inference", {"auc_positives": 0.55, "auc_negatives": 0.51}, "a"), (0.55, 0.7, MOST)),
        (check("subgroups", {"all": 0.65, "age=below-65": 0.62, "age=from-65": 0.7}, "a"), (0.03, 0.35, MOST)),
        (check("attestation", {}), (None, None, MOST)),
    ],
)
def test_a_check_is_told_with_the_figure_that_decided(
    found: pm.Check, expected: tuple[float | None, float | None, bool]
) -> None:
    (one,) = judged(PLAN, HOSPITALS, [found])
    value = one.value if one.value is None else pytest.approx(one.value)
    assert (value, one.limit, one.at_least) == expected
    assert one.signed_by == len(found.signed_by)


def test_the_measurement_is_charged_as_a_round_that_trains_and_all_of_it_stays_within_epsilon() -> None:
    assert PLAN.privacy is not None
    assert PLAN.checks is not None
    budget = check("budget", {"most_charged": PLAN.rounds.count, "allowed": 14})
    privacy, _ = judged(PLAN, HOSPITALS, [check("privacy", {"epsilon": 0.5, "delta": 1e-6}), budget])
    assert privacy.limit == PLAN.privacy.epsilon
    assert privacy.value == training_noise(PLAN, HOSPITALS).epsilon_after(PLAN.rounds.count)
    everything = PLAN.rounds.count + PLAN.privacy.extra_attempts
    assert privacy.value < training_noise(PLAN, HOSPITALS).epsilon_after(everything) <= PLAN.privacy.epsilon

    [(_, trains), *_] = mechanisms(NoiseRequest(PLAN, 1, HOSPITALS))
    [(_, _validation), (_, measures)] = mechanisms(NoiseRequest(PLAN, PLAN.rounds.count, HOSPITALS))
    assert (trains.epsilon, trains.delta, trains.compositions) == (
        measures.epsilon,
        measures.delta,
        measures.compositions,
    )
    assert trains.compositions == everything


def test_a_version_that_a_check_blocks_is_told_as_not_promoted() -> None:
    blocked = Promotion(12, judged(PLAN, HOSPITALS, [check("divergence", {}, passed=False)]))
    assert not blocked.promoted
    told = blocked.as_dict()
    assert (told["alias"], told["approved_by"]) == (None, None)
    assert told["checks"]["divergence"]["passed"] is False
