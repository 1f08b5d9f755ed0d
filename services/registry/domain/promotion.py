"""Whether a model version may be promoted: the checks that the centre makes, and what it makes of the hospitals'.

Nothing here opens a model: the centre knows who took part, what was charged, which noised metrics the hospitals
published, and what hospitals signed. A check that is missing blocks as one that failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import accumulate
from typing import Any, Final
from uuid import UUID, uuid5

from services.common.errors import Code, FedmeshError
from services.plans.checks import Checks
from services.plans.manifest import PlanManifest
from services.registry.domain.entities import CommittedRound, Job, Plan
from services.secure_sum.cohort import threshold
from services.transparency.attestation import WAIVABLE, claimed_predicate
from services.transparency.findings import HOSPITAL_CHECKS, Findings

PRODUCTION: Final = "production"
CANDIDATE: Final = "candidate"
REGISTRY: Final = "registry"
HOSPITALS: Final = "hospitals"
# The metrics of version v judge the state of version v - 1; the plan's initial state is no version.
FIRST_MEASURED: Final = 2


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    MISSING = "missing"


@dataclass(frozen=True)
class Check:
    """One check's result. made_by: `registry` or `hospitals`; signed_by: the hospitals whose reports say so."""

    check: str
    outcome: Outcome
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)
    made_by: str = REGISTRY
    signed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attestation:
    """A version's signed statement; `event_id` tells the audit log of its SHA-256, at `index` once it is there."""

    job_id: UUID
    version: int
    envelope: bytes
    sha256: str
    event_id: UUID
    index: int | None = None


@dataclass(frozen=True)
class CheckReport:
    """What a hospital found of a version, in its own bytes."""

    hospital_id: str
    job_id: UUID
    version: int
    statement: bytes
    signature: bytes


@dataclass(frozen=True)
class Alias:
    """Where an alias of a model points; a model is what plans of one name make."""

    model: str
    alias: str
    job_id: UUID
    version: int
    moved_by: str
    moved_at: datetime
    promotion_id: UUID | None


@dataclass(frozen=True)
class Tag:
    key: str
    value: str
    set_by: str
    set_at: datetime


@dataclass(frozen=True)
class Promotion:
    """Proposed by one person, approved by another. The verdicts are envelopes that the registry signed."""

    promotion_id: UUID
    model: str
    alias: str
    job_id: UUID
    version: int
    proposed_by: str
    proposed_at: datetime
    proposal_verdict: bytes
    approved_by: str | None = None
    approved_at: datetime | None = None
    approval_verdict: bytes = b""
    # Of the audit log's entry that tells of the alias's move, once it is there and where it is asked for.
    alias_index: int | None = None

    @property
    def reason(self) -> str:
        """Why a check was set aside, as the proposer stated it in the signed verdict; empty when none was."""
        waived = claimed_predicate(self.proposal_verdict).get("waived", {})
        return "; ".join(waived.values())


@dataclass(frozen=True)
class Rollback:
    """A job that was stopped at `diverged_version` because its model got worse; `good_version` is its result."""

    job_id: UUID
    diverged_version: int
    good_version: int
    reason: str
    at: datetime


@dataclass(frozen=True)
class Spending:
    """What hospitals reported of their ledgers about a job.

    charged: charges by hospital of the cohort. uncharged: contributions for which no charge was reported. differing:
    hospitals of the cohort whose ledger was found to differ since the job began.
    """

    charged: Mapping[str, int]
    uncharged: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that the checks look at. rounds: those up to the version, oldest first; metrics: numbers by version."""

    job: Job
    version: int
    plan: Plan
    manifest: PlanManifest
    rounds: Sequence[CommittedRound]
    metrics: Mapping[int, Mapping[str, float]]
    spending: Spending
    findings: Sequence[Findings]
    attested: bool
    rollback: Rollback | None


def evaluate(seen: Evidence) -> tuple[Check, ...]:
    """Every check of a version, as it stands."""
    return (
        _privacy(seen),
        _attestation(seen),
        _quorum(seen),
        _budget(seen),
        _convergence(seen),
        _divergence(seen),
        *(_signed(seen, name) for name in HOSPITAL_CHECKS),
    )


def move_event_id(promotion_id: UUID) -> UUID:
    """The id of the event that tells the audit log of an alias's move by this promotion."""
    return uuid5(promotion_id, "alias.moved")


def require_promotable(checks: Sequence[Check], reason: str = "") -> None:
    """reason: why two people set a failed check of `WAIVABLE` aside; empty: nothing is.

    Raises: FedmeshError(PRIVACY_REFUSED) without privacy, (WRONG_STATE) naming every check that blocks,
        (INVALID_ARGUMENT) for a reason without a check that it could set aside.
    """
    blocking = [item for item in checks if item.outcome is not Outcome.PASSED]
    if reason:
        waived = _waived(checks)
        if not waived:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"no failed check of {', '.join(sorted(WAIVABLE))} is there to be set aside"
            )
        blocking = [item for item in blocking if item.check not in waived]
    if not blocking:
        return
    if any(item.check == "privacy" for item in blocking):
        reason = next(item.reason for item in blocking if item.check == "privacy")
        raise FedmeshError(Code.PRIVACY_REFUSED, f"promotion is refused: {reason}")
    listed = "; ".join(f"{item.check} {item.outcome.value}: {item.reason}" for item in blocking)
    raise FedmeshError(Code.WRONG_STATE, f"promotion is refused: {listed}"[:1500])


def require_other_person(promotion: Promotion, approver: str) -> None:
    """Raises: FedmeshError(PERMISSION_DENIED) when the one who proposed would approve."""
    if promotion.proposed_by == approver:
        raise FedmeshError(
            Code.PERMISSION_DENIED, "a promotion must be approved by another operator than the one who proposed it"
        )


def require_open(promotion: Promotion) -> None:
    """Raises: FedmeshError(WRONG_STATE) when it is approved already."""
    if promotion.approved_by is not None:
        raise FedmeshError(Code.WRONG_STATE, f"promotion {promotion.promotion_id} is approved already")


def require_plain_alias(alias: str) -> None:
    """Raises: FedmeshError(PERMISSION_DENIED) for an alias that moves by promotion only."""
    if alias == PRODUCTION:
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"{PRODUCTION} moves by promotion only: `fedmesh models promote`, by two people"
        )


def diverged(checks: Checks, metrics: Mapping[int, Mapping[str, float]]) -> tuple[int, int, str] | None:
    """(version that showed it, last good version, why) when a measurement is too far below the best one before.

    The metrics of version v judge the state of version v - 1: the good version is the one whose state measured best.
    The plan's initial state is no version: a fall below it alone is not one to go back from.
    """
    best: tuple[int, float] | None = None
    for version in sorted(metrics):
        auroc = metrics[version].get("auroc")
        if auroc is None or version < FIRST_MEASURED:
            continue
        if best is not None and auroc < best[1] - checks.largest_auroc_drop:
            why = (
                f"AUROC {auroc:.4f} in round {version}, more than {checks.largest_auroc_drop:g} below the"
                f" {best[1]:.4f} of version {best[0] - 1}"
            )
            return version, best[0] - 1, why
        if best is None or auroc > best[1]:
            best = version, auroc
    return None


def _waived(checks: Sequence[Check]) -> list[str]:
    return [item.check for item in checks if item.check in WAIVABLE and item.outcome is Outcome.FAILED]


def verdict(seen: Evidence, checks: Sequence[Check], reason: str = "") -> dict[str, Any]:
    """The predicate of a signed verdict: the checks with what they rest on, and those that were set aside for a reason.
    Free of times: it can be repeated.
    """
    waived = {"waived": dict.fromkeys(_waived(checks), reason)} if reason else {}
    return {
        **waived,
        "checks": {
            item.check: {
                "figures": dict(item.figures),
                "made_by": item.made_by,
                "outcome": item.outcome.value,
                "reason": item.reason,
                "signed_by": list(item.signed_by),
            }
            for item in checks
        },
        "job_id": str(seen.job.job_id),
        "plan_id": seen.plan.plan_id,
        "version": seen.version,
    }


def _passed_if(passed: bool, check: str, good: str, bad: str, **figures: float) -> Check:
    return Check(check, Outcome.PASSED if passed else Outcome.FAILED, good if passed else bad, figures)


def _privacy(seen: Evidence) -> Check:
    privacy = seen.manifest.privacy
    if privacy is None:
        return Check(
            "privacy", Outcome.FAILED, "the plan has no differential privacy; such versions are never promoted"
        )
    figures = {"epsilon": privacy.epsilon, "delta": privacy.delta}
    return Check("privacy", Outcome.PASSED, f"patient-level, epsilon {privacy.epsilon:g} a job", figures)


def _attestation(seen: Evidence) -> Check:
    if seen.attested:
        return Check("attestation", Outcome.PASSED, "the version has a signed statement")
    return Check(
        "attestation",
        Outcome.MISSING,
        "the version has no signed statement: it is burnt, or the registry had no signing key",
    )


def _quorum(seen: Evidence) -> Check:
    needed = threshold(max(seen.job.roster_size, 1))
    made = [item.round for item in seen.rounds if not item.round.burnt]
    least = min((min(len(told.contributions), len(told.agreeing)) for told in made), default=0)
    dissenting = sorted({name for told in made for name in told.dissenting})
    figures = {"rounds": len(made), "burnt": len(seen.rounds) - len(made), "least": least, "needed": needed}
    if not made or least < needed:
        return Check("quorum", Outcome.FAILED, f"a round with {least} hospitals, {needed} are needed", figures)
    if dissenting:
        return Check("quorum", Outcome.FAILED, f"saw another sum: {', '.join(dissenting)}", figures)
    return Check("quorum", Outcome.PASSED, f"at least {least} hospitals in every round, {needed} are needed", figures)


def _budget(seen: Evidence) -> Check:
    privacy, spending = seen.manifest.privacy, seen.spending
    allowed = seen.manifest.rounds.count + (privacy.extra_attempts if privacy is not None else 0)
    most = max(spending.charged.values(), default=0)
    figures = {"most_charged": most, "allowed": allowed, "uncharged": spending.uncharged}
    over = sorted(name for name, charged in spending.charged.items() if charged > allowed)
    problems = {
        "the plan was not approved by a second person": seen.plan.approved_by is None,
        f"charged more often than the {allowed} times that the noise is for: {', '.join(over)}": bool(over),
        f"{spending.uncharged} contributions whose charge no hospital reported": spending.uncharged > 0,
        f"another ledger than the one reported before: {', '.join(spending.differing)}": bool(spending.differing),
    }
    wrong = [text for text, holds in problems.items() if holds]
    if wrong:
        return Check("budget", Outcome.FAILED, "; ".join(wrong), figures)
    return Check("budget", Outcome.PASSED, f"every contribution charged, at most {most} of {allowed} times", figures)


def _measured(seen: Evidence) -> list[tuple[int, float]]:
    told = ((version, seen.metrics[version].get("auroc")) for version in sorted(seen.metrics))
    return [(version, auroc) for version, auroc in told if auroc is not None and version <= seen.version]


def _convergence(seen: Evidence) -> Check:
    checks, measured = seen.manifest.checks, _measured(seen)
    if checks is None:
        return Check("convergence", Outcome.MISSING, "the plan declares no checks")
    if not measured or measured[-1][0] != seen.manifest.measuring_round:
        return Check("convergence", Outcome.MISSING, "the last round, which measures this state, is not there")
    first, last = measured[0][1], measured[-1][1]
    figures = {"first_auroc": first, "last_auroc": last, "least_auroc": checks.least_auroc}
    return _passed_if(
        last >= checks.least_auroc,
        "convergence",
        f"validation AUROC {last:.4f}, at least {checks.least_auroc:g} is asked",
        f"validation AUROC {last:.4f} is below {checks.least_auroc:g}",
        **figures,
    )


def _divergence(seen: Evidence) -> Check:
    checks = seen.manifest.checks
    if checks is None:
        return Check("divergence", Outcome.MISSING, "the plan declares no checks")
    if seen.rollback is not None and seen.version > seen.rollback.good_version:
        return Check(
            "divergence", Outcome.FAILED, f"rolled back to version {seen.rollback.good_version}: {seen.rollback.reason}"
        )
    found = diverged(checks, {version: seen.metrics[version] for version in seen.metrics if version <= seen.version})
    if found is not None:
        return Check("divergence", Outcome.FAILED, found[2])
    measured = [auroc for version, auroc in _measured(seen) if version >= FIRST_MEASURED]
    if not measured:
        return Check("divergence", Outcome.MISSING, "no round up to this version measured anything")
    fall = max(best - auroc for best, auroc in zip(accumulate(measured, max), measured, strict=True))
    return Check(
        "divergence",
        Outcome.PASSED,
        f"no measurement fell by more than {checks.largest_auroc_drop:g}",
        {"largest_fall": round(fall, 6), "allowed": checks.largest_auroc_drop},
    )


def _signed(seen: Evidence, check: str) -> Check:
    """What t hospitals or more say alike; fewer than t make it missing, whatever they say."""
    needed = threshold(max(seen.job.roster_size, 1))
    said = {report.hospital_id: item for report in seen.findings for item in report.findings if item.check == check}
    passed = sorted(name for name, item in said.items() if item.passed)
    failed = sorted(name for name, item in said.items() if not item.passed)
    if len(passed) >= needed:
        one = said[passed[0]]
        return Check(check, Outcome.PASSED, one.reason, one.figures, HOSPITALS, tuple(passed))
    # t of n say it passed, or it did not: with n - t + 1 against it, t can no longer be for it.
    if len(failed) > seen.job.roster_size - needed:
        one = said[failed[0]]
        return Check(check, Outcome.FAILED, one.reason, one.figures, HOSPITALS, tuple(failed))
    reason = f"{len(passed)} hospitals signed that it passed, {len(failed)} that it failed; {needed} are needed"
    return Check(check, Outcome.MISSING, reason, {}, HOSPITALS, tuple(passed))
