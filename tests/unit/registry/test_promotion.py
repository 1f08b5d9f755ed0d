"""The rules of the promotion gate, without a store."""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from services.common.errors import Code, FedmeshError
from services.plans.checks import Checks
from services.plans.manifest import plan_id
from services.registry.domain.entities import CommittedRound, Contribution, Job, JobStatus, Plan, PlanStatus, Round
from services.registry.domain.promotion import (
    Evidence,
    Outcome,
    Rollback,
    Spending,
    diverged,
    evaluate,
    require_promotable,
)
from services.transparency.findings import HOSPITAL_CHECKS, Finding, Findings
from tests.support.tiny_plan import PRIVATE, changed, manifest

NAMES = tuple(f"h{number}" for number in range(1, 6))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = uuid4()
TINY = manifest({**PRIVATE, "checks": {"least_auroc": 0.6, "largest_auroc_drop": 0.05}})


def a_round(version: int, **changes: object) -> CommittedRound:
    told = Round(
        job_id=JOB,
        version=version,
        attempt=1,
        contributions=tuple(Contribution(name, "a" * 64) for name in NAMES),
        sum_sha256="b" * 64,
        agreeing=NAMES,
        dissenting=(),
        finalizer=NAMES[0],
        attesting=NAMES[1:],
        state_sha256="c" * 64,
        metrics_json="",
        upload_bytes=1,
        sealed_at=NOW,
        content_sha256=b"",
        survivors_sha256="d" * 64,
    )
    return CommittedRound(replace(told, **changes), "e" * 64, NOW)  # type: ignore[arg-type]


def findings(name: str, passed: bool = True) -> Findings:
    found = tuple(Finding(check, passed, "said so", {"auc": 0.5}) for check in HOSPITAL_CHECKS)
    return Findings(name, str(JOB), 4, "c" * 64, found)


def evidence(**changes: object) -> Evidence:
    """A version for which everything speaks."""
    job = Job(
        *(JOB, plan_id(TINY), TINY.name, True, NAMES, JobStatus.COMPLETED, "", 4, 4, "c" * 64, NOW, NOW, "f" * 64, 5)
    )
    plan = Plan(plan_id(TINY), TINY.name, b"", 4, True, PlanStatus.APPROVED, "alice", "bob", NOW)
    seen = Evidence(
        job=job,
        version=4,
        plan=plan,
        manifest=TINY,
        rounds=[a_round(version) for version in range(1, 5)],
        metrics={2: {"auroc": 0.61}, 4: {"auroc": 0.65}},
        spending=Spending(dict.fromkeys(NAMES, 4), 0, ()),
        findings=[findings(name) for name in NAMES],
        attested=True,
        rollback=None,
    )
    return replace(seen, **changes)  # type: ignore[arg-type]


def outcome(seen: Evidence, check: str) -> tuple[Outcome, str]:
    return next((item.outcome, item.reason) for item in evaluate(seen) if item.check == check)


def test_a_version_for_which_everything_speaks_may_be_promoted() -> None:
    checks = evaluate(evidence())
    assert [item.check for item in checks if item.outcome is not Outcome.PASSED] == []
    assert {item.made_by for item in checks if item.check in HOSPITAL_CHECKS} == {"hospitals"}
    require_promotable(checks)


@pytest.mark.parametrize(
    ("check", "expected", "changes"),
    [
        ("attestation", Outcome.MISSING, {"attested": False}),
        ("quorum", Outcome.FAILED, {"rounds": [a_round(1), a_round(2, agreeing=NAMES[:3])]}),
        ("quorum", Outcome.FAILED, {"rounds": [a_round(1, dissenting=("h5",), agreeing=NAMES[:4])]}),
        ("quorum", Outcome.FAILED, {"rounds": [a_round(1, burnt=True)]}),
        ("budget", Outcome.FAILED, {"spending": Spending(dict.fromkeys(NAMES, 4), 1, ())}),
        ("budget", Outcome.FAILED, {"spending": Spending({"h1": 6}, 0, ())}),
        ("budget", Outcome.FAILED, {"spending": Spending({}, 0, ("h2",))}),
        ("convergence", Outcome.FAILED, {"metrics": {4: {"auroc": 0.59}}}),
        ("convergence", Outcome.MISSING, {"metrics": {2: {"auroc": 0.7}}}),
        ("convergence", Outcome.MISSING, {"metrics": {}}),
        ("divergence", Outcome.FAILED, {"metrics": {2: {"auroc": 0.75}, 4: {"auroc": 0.69}}}),
        ("divergence", Outcome.MISSING, {"metrics": {4: {"loss": 0.3}}}),
        ("divergence", Outcome.FAILED, {"rollback": Rollback(JOB, 4, 3, "worse", NOW)}),
        ("subgroups", Outcome.MISSING, {"findings": [findings(name) for name in NAMES[:3]]}),
        ("saturation", Outcome.FAILED, {"findings": [findings(name, name > "h2") for name in NAMES]}),
        # One that lies cannot block what t say, nor can fewer than t make it pass.
        ("membership-inference", Outcome.PASSED, {"findings": [findings(name, name > "h1") for name in NAMES]}),
        ("membership-inference", Outcome.MISSING, {"findings": [findings(name, name > "h1") for name in NAMES[:4]]}),
    ],
)
def test_what_speaks_against_it_blocks(check: str, expected: Outcome, changes: dict[str, object]) -> None:
    seen = evidence(**changes)
    found, reason = outcome(seen, check)
    assert (found, bool(reason)) == (expected, True)
    if expected is not Outcome.PASSED:
        with pytest.raises(FedmeshError, match=f"{check} {expected.value}: ") as refused:
            require_promotable(evaluate(seen))
        assert refused.value.code is Code.WRONG_STATE


def test_without_privacy_or_checks_nothing_is_promoted() -> None:
    bare = manifest(changed(changed(changed(PRIVATE, "privacy", None), "metrics.epsilon", None), "metrics.delta", None))
    with pytest.raises(FedmeshError) as refused:
        require_promotable(evaluate(evidence(manifest=bare)))
    assert refused.value.code is Code.PRIVACY_REFUSED
    assert outcome(evidence(manifest=manifest(PRIVATE)), "convergence") == (
        Outcome.MISSING,
        "the plan declares no checks",
    )


def test_a_fall_below_the_best_measurement_is_a_divergence() -> None:
    bounds = Checks(largest_auroc_drop=0.05)

    def measured(*aurocs: float) -> dict[int, dict[str, float]]:
        return {2 * number: {"auroc": auroc} for number, auroc in enumerate(aurocs, 1)}

    assert diverged(bounds, measured(0.60, 0.65, 0.61)) is None
    assert diverged(bounds, measured(0.60)) is None
    found = diverged(bounds, measured(0.60, 0.65, 0.64, 0.59))
    assert found is not None
    # Round 4 measured the state of version 3.
    assert found[:2] == (8, 3)
    assert "0.5900 in round 8" in found[2]
