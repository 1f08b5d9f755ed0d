"""What this hospital agrees to: rules on plans, cohorts, groups and sums, without any input or output."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import JobFacts, LocalJob, Reservation
from services.hospital_node.domain.tasks import Task
from services.plans.algorithms import InstalledFamily
from services.plans.manifest import PlanManifest
from services.secure_sum.cohort import colluders, require_private, threshold, tolerated
from services.secure_sum.roster import Roster

MOST_LATE: Final = timedelta(days=1)


@dataclass(frozen=True)
class Policy:
    """The hospital's own settings; see `config.PrivacyConfig` and `config.LimitsConfig`."""

    hospital_id: str
    population: str
    max_plan_epsilon: float
    max_plan_delta: float
    allow_without_privacy: bool
    max_rounds: int
    max_vector_length: int
    plan_families: frozenset[str] = frozenset()
    # None: as many as the roster tolerates.
    least_colluders: int | None = None


def require_acceptable(policy: Policy, manifest: PlanManifest, hospitals: int) -> None:
    """Check a plan before any data is read for it. hospitals: the size of the roster, on which its noise rests.

    Raises: FedmeshError(PRIVACY_REFUSED) for too little privacy, fewer than 4 hospitals, or groups below t;
        PLAN_INVALID for a plan beyond this node's limits, or of an installed family that it does not allow.
    """
    _require_privacy(policy, manifest, hospitals)
    _require_allowed_family(policy, manifest)
    needed = threshold(hospitals)
    if manifest.rounds.k is not None and manifest.rounds.k < needed:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"rounds.k = {manifest.rounds.k}: a group has at least {needed} of the roster's {hospitals} hospitals",
            threshold=needed,
        )
    asked = {
        "rounds": (manifest.rounds.count, policy.max_rounds),
        "coordinates": (manifest.vector_length, policy.max_vector_length),
    }
    for what, (value, limit) in asked.items():
        if value > limit:
            raise FedmeshError(
                Code.PLAN_INVALID, f"the plan has {value} {what}, this hospital takes at most {limit}", limit=limit
            )


def _require_allowed_family(policy: Policy, manifest: PlanManifest) -> None:
    algorithm = manifest.algorithm
    if isinstance(algorithm, InstalledFamily) and algorithm.family not in policy.plan_families:
        allowed = ", ".join(sorted(policy.plan_families)) or "none"
        raise FedmeshError(
            Code.PLAN_INVALID,
            f"the plan trains by the installed family {algorithm.family!r}, which this hospital does not allow "
            f"(allowed: {allowed}); its admin can add it to plan_families in the node's configuration",
            field="algorithm.family",
        )


def _require_privacy(policy: Policy, manifest: PlanManifest, hospitals: int) -> None:
    if manifest.privacy is None:
        if not policy.allow_without_privacy:
            raise FedmeshError(
                Code.PRIVACY_REFUSED, "the plan has no privacy, and this hospital does not train without it"
            )
        return
    require_private(hospitals)
    _require_colluders(policy, manifest.privacy.colluders, hospitals)
    epsilon, delta = plan_loss(manifest)
    if epsilon > policy.max_plan_epsilon or delta > policy.max_plan_delta:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"the plan asks for epsilon {epsilon:g} and delta {delta:g}; this hospital allows a plan at most"
            f" {policy.max_plan_epsilon:g} and {policy.max_plan_delta:g}",
            asked=f"{epsilon:g}",
            allowed=f"{policy.max_plan_epsilon:g}",
        )


def _require_colluders(policy: Policy, asked: int | None, hospitals: int) -> None:
    """Check against how many colluding hospitals the plan's noise is made. asked: `privacy.colluders` of the plan."""
    found = tolerated(hospitals, asked)
    least = colluders(hospitals) if policy.least_colluders is None else policy.least_colluders
    if found < least:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"the guarantee is against f = {found} colluding hospitals; this hospital demands one against {least}:"
            " its admin decides that by privacy.least_colluders in the node's configuration",
            asked=found,
            least=least,
        )


def plan_loss(manifest: PlanManifest) -> tuple[float, float]:
    """(epsilon, delta) of a patient over the whole plan; (0, 0) for a plan without privacy.

    Training and validation patients are disjoint, so the two mechanisms compose in parallel: the larger of both counts.
    """
    privacy, metrics = manifest.privacy, manifest.metrics
    if privacy is None:
        return 0.0, 0.0
    if metrics is None:
        return privacy.epsilon, privacy.delta
    return max(privacy.epsilon, metrics.epsilon or 0.0), max(privacy.delta, metrics.delta or 0.0)


def compositions(manifest: PlanManifest) -> tuple[int, int]:
    """Attempts that the noise of the training part and of the metrics part must cover."""
    extra = manifest.privacy.extra_attempts if manifest.privacy is not None else 0
    measured = len(manifest.metrics_rounds)
    return manifest.rounds.count + extra, measured + extra if measured else 0


def reservation(policy: Policy, task: Task, manifest: PlanManifest, local: LocalJob, roster: Roster) -> Reservation:
    """What a job asks of the ledger."""
    epsilon, delta = plan_loss(manifest)
    attempts, measured = compositions(manifest)
    return Reservation(
        job_id=task.attempt.job_id,
        plan_id=task.plan_id,
        population=local.population or policy.population,
        private=manifest.privacy is not None,
        epsilon=epsilon,
        delta=delta,
        colluders=tolerated(roster.size, manifest.privacy.colluders) if manifest.privacy is not None else 0,
        compositions=attempts,
        metrics_compositions=measured,
        cohort=tuple(sorted(task.cohort)),
        data_sha256=local.data_sha256,
    )


def require_recent(task: Task, now: datetime) -> None:
    """Check, before anything is spent, that this machine's clock is not far ahead of the coordinator's.

    What is spent is dated by this clock and counts for a year from then on: under a clock that is a year ahead, what
    was spent before would count no more. A task that is as old as that is of no use either.

    Raises: FedmeshError(DEADLINE_EXCEEDED).
    """
    if task.deadline is not None and now - task.deadline > MOST_LATE:
        raise FedmeshError(
            Code.DEADLINE_EXCEEDED,
            f"by this machine's clock ({now:%Y-%m-%d %H:%M} UTC) the task ended {(now - task.deadline).days} days ago: "
            "nothing is spent under a clock that may be wrong; compare it with the coordinator's",
        )


def require_same_job(policy: Policy, task: Task, job: JobFacts, manifest: PlanManifest) -> None:
    """Check that the coordinator asks for what the registry says was agreed.

    Raises: FedmeshError(PLAN_INVALID) naming what differs.
    """
    cohort = set(task.cohort)
    problems = {
        "its plan": job.plan_id != task.plan_id,
        "its cohort": cohort != set(job.hospital_ids) or len(cohort) != len(task.cohort),
        "its number of rounds": job.rounds != manifest.rounds.count,
        "its roster": job.roster_sha256 != task.roster_sha256,
    }
    wrong = [what for what, differs in problems.items() if differs]
    if wrong:
        raise FedmeshError(
            Code.PLAN_INVALID, f"registry and coordinator disagree about job {task.attempt.job_id}: {', '.join(wrong)}"
        )
    if policy.hospital_id not in cohort:
        raise FedmeshError(Code.PLAN_INVALID, f"{policy.hospital_id} is not in the cohort of job {task.attempt.job_id}")


def require_members(task: Task, roster: Roster, newest: Roster) -> None:
    """Check the cohort against the job's roster, and that nobody of that roster has lost its place since.

    A roster that is not the newest still holds for a job that began under it, as long as whoever left, or whose keys
    were replaced, does not know the keys of its epochs.

    Raises: FedmeshError(PRIVACY_REFUSED).
    """
    strangers = sorted(name for name in task.cohort if name not in roster)
    if strangers:
        raise FedmeshError(Code.PRIVACY_REFUSED, f"not members of the roster: {', '.join(strangers)}")
    if len(task.cohort) < roster.threshold:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"a cohort of {len(task.cohort)} of the roster's {roster.size} hospitals is refused:"
            f" {roster.threshold} are needed",
        )
    gone = [member.hospital_id for member in roster.statement.members if member not in newest.statement.members]
    if gone:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"the job's roster has {', '.join(gone)}, which the newest one has no longer, or with other keys:"
            " start a new job",
        )
