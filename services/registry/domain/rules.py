"""The rules of the registry, free of stores and wires."""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from services.common.errors import Code, FedmeshError
from services.registry.domain.entities import Hospital, HospitalStatus, Job, JobStatus, Plan, PlanStatus, Round
from services.secure_sum.cohort import MIN_PRIVATE_HOSPITALS, require_private, threshold

MIN_COHORT: Final = 2
MAX_COHORT: Final = 16
MAX_METRICS: Final = 200
_METRIC_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")


def require_status_change(hospital: Hospital, status: HospitalStatus) -> None:
    """A removed hospital never comes back.

    Raises: FedmeshError(WRONG_STATE).
    """
    if hospital.status is HospitalStatus.REMOVED and status is not HospitalStatus.REMOVED:
        raise FedmeshError(
            Code.WRONG_STATE, f"hospital {hospital.hospital_id} was removed for good: register it under a new id"
        )


def require_second_person(plan: Plan, approver: str) -> None:
    """The author of a plan cannot approve it.

    Raises: FedmeshError(PERMISSION_DENIED).
    """
    if plan.proposed_by == approver:
        raise FedmeshError(Code.PERMISSION_DENIED, "a plan must be approved by another operator than its author")


def require_cohort(plan: Plan, hospital_ids: Sequence[str], known: dict[str, Hospital]) -> tuple[str, ...]:
    """The sorted cohort of a new job.

    known: the registered hospitals among those named.

    Raises: FedmeshError(INVALID_ARGUMENT) for a wrong number or repeated names, (PRIVACY_REFUSED) for a cohort too
        small for the plan's privacy, (NOT_FOUND) for unknown hospitals, (WRONG_STATE) for an unapproved plan or
        hospitals that are not active.
    """
    if plan.status is not PlanStatus.APPROVED:
        raise FedmeshError(
            Code.WRONG_STATE, f"plan {plan.name} is not approved: another operator must approve it first"
        )
    _require_distinct(hospital_ids, "hospital_ids")
    if not MIN_COHORT <= len(hospital_ids) <= MAX_COHORT:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"a job needs {MIN_COHORT} to {MAX_COHORT} hospitals, not {len(hospital_ids)}"
        )
    if plan.private:
        require_private(len(hospital_ids))
    unknown = sorted(set(hospital_ids) - set(known))
    if unknown:
        raise FedmeshError(Code.NOT_FOUND, f"not registered: {', '.join(unknown)}")
    barred = sorted(name for name in hospital_ids if known[name].status is not HospitalStatus.ACTIVE)
    if barred:
        raise FedmeshError(Code.WRONG_STATE, f"not active: {', '.join(barred)}")
    return tuple(sorted(hospital_ids))


def require_running(job: Job) -> None:
    """Raises: FedmeshError(WRONG_STATE) when the job has ended."""
    if job.status is not JobStatus.RUNNING:
        raise FedmeshError(Code.WRONG_STATE, f"job {job.job_id} is {job.status.value}", status=job.status.value)


def require_next_version(job: Job, version: int, what: str) -> None:
    """Raises: FedmeshError(WRONG_STATE) unless `version` is the one after the job's."""
    if version != job.version + 1:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"{what} must be {job.version + 1}, the job's version plus one, not {version}",
            version=job.version,
        )


def require_newest_attempt(attempt: int, newest: int) -> None:
    """Only the attempt that was opened last may commit; an older one lost.

    Raises: FedmeshError(WRONG_STATE).
    """
    if attempt != newest:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"attempt {attempt} cannot commit: the newest attempt of this round is {newest or 'not opened'}",
            newest=newest,
        )


def require_quorum(job: Job, committed: Round) -> None:
    """Check who is named in a round against the job's cohort.

    With n >= 4 hospitals, at least threshold(n) contributed and at least threshold(n) saw the same plaintext; in
    smaller cohorts at least two did, because the sum of one contribution is that contribution.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the list that is wrong.
    """
    contributors = [item.hospital_id for item in committed.contributions]
    lists = {
        "contributions": contributors,
        "agreeing": committed.agreeing,
        "dissenting": committed.dissenting,
        "attesting": committed.attesting,
    }
    for field, names in lists.items():
        _require_distinct(names, field)
        strangers = sorted(set(names) - set(job.hospital_ids))
        if strangers:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"{field}: not in the cohort: {', '.join(strangers)}", field=field
            )
    both = sorted(set(committed.agreeing) & set(committed.dissenting))
    if both:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"agreeing and dissenting at once: {', '.join(both)}")
    n = len(job.hospital_ids)
    needed = threshold(n) if n >= MIN_PRIVATE_HOSPITALS else MIN_COHORT
    for field in ("contributions", "agreeing"):
        if len(lists[field]) < needed:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"{field}: {len(lists[field])} of {n} hospitals, at least {needed} are needed",
                field=field,
            )
    if committed.finalizer not in committed.agreeing:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"finalizer {committed.finalizer!r} is not among the agreeing hospitals"
        )


def parse_metrics(text: str) -> dict[str, float]:
    """The numbers in `metrics_json`; empty text means none.

    Raises: FedmeshError(INVALID_ARGUMENT) unless it is a flat JSON object of at most 200 finite numbers.
    """
    if not text:
        return {}
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "metrics_json is not JSON") from error
    if not isinstance(pairs, list) or not text.lstrip().startswith("{"):
        raise FedmeshError(Code.INVALID_ARGUMENT, "metrics_json must be a JSON object of numbers")
    if len(pairs) > MAX_METRICS:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"metrics_json has {len(pairs)} numbers, {MAX_METRICS} at most")
    _require_distinct([name for name, _ in pairs], "metrics_json")
    return {name: _finite(name, value) for name, value in pairs}


def _finite(name: str, value: object) -> float:
    if not _METRIC_NAME.fullmatch(name):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"metrics_json: {name[:80]!r} is not a name like validation_auroc")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"metrics_json: {name} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"metrics_json: {name} is not finite")
    return number


def _require_distinct(names: Iterable[str] | Collection[str], field: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"{field}: {name} appears twice", field=field)
        seen.add(name)
