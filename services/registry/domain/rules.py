"""The rules of the registry, free of stores and wires."""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from services.common.errors import Code, FedmeshError
from services.registry.domain.entities import (
    Hospital,
    HospitalStatus,
    Job,
    JobStatus,
    KeyEpoch,
    MemberStanding,
    Plan,
    PlanStatus,
    PublishedRoster,
    Round,
    SurvivorList,
)
from services.secure_sum.cohort import require_private, threshold
from services.secure_sum.opening import check_confirmed
from services.secure_sum.parameters import public_key_sets
from services.secure_sum.roster import Roster, verify_founding, verify_successor
from services.secure_sum.statements import EpochStatement, Survivors

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


def require_cohort(
    plan: Plan, hospital_ids: Sequence[str], known: dict[str, Hospital], roster: Roster | None
) -> tuple[str, ...]:
    """The sorted cohort of a new job.

    known: the registered hospitals among those named. roster: the present one.

    Raises: FedmeshError(INVALID_ARGUMENT) for a wrong number, repeated names or hospitals outside the roster,
        (PRIVACY_REFUSED) for a roster too small for the plan's privacy, (NOT_FOUND) for unknown hospitals,
        (WRONG_STATE) for an unapproved plan, hospitals that are not active, or while there is no roster.
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
    unknown = sorted(set(hospital_ids) - set(known))
    if unknown:
        raise FedmeshError(Code.NOT_FOUND, f"not registered: {', '.join(unknown)}")
    barred = sorted(name for name in hospital_ids if known[name].status is not HospitalStatus.ACTIVE)
    if barred:
        raise FedmeshError(Code.WRONG_STATE, f"not active: {', '.join(barred)}")
    _require_members(hospital_ids, roster, plan.private)
    return tuple(sorted(hospital_ids))


def _require_members(hospital_ids: Sequence[str], roster: Roster | None, private: bool) -> None:
    if roster is None:
        raise FedmeshError(
            Code.WRONG_STATE, "there is no roster yet: publish the founding one, signed by every hospital, first"
        )
    if private:
        require_private(roster.size)
    strangers = sorted(name for name in hospital_ids if name not in roster)
    if strangers:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"not in the present roster: {', '.join(strangers)}: publish a roster with them first",
            field="hospital_ids",
        )
    if len(hospital_ids) < roster.threshold:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"{len(hospital_ids)} of the roster's {roster.size} hospitals, at least {roster.threshold} are needed",
            field="hospital_ids",
        )


def require_following(present: PublishedRoster | None, statement: bytes, signatures: dict[str, bytes]) -> Roster:
    """The roster that a statement makes: the founding one, or the one after the present.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    if present is None:
        return verify_founding(statement, signatures)
    return verify_successor(present.roster, statement, signatures)


def require_fit_members(roster: Roster, consortium: str, known: dict[str, Hospital]) -> None:
    """A roster speaks for this consortium, and of hospitals that the registry knows.

    Raises: FedmeshError(STATEMENT_INVALID) for another consortium, (NOT_FOUND) for members that are not registered,
        (WRONG_STATE) for members that were removed.
    """
    if roster.statement.consortium != consortium:
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"the roster is of {roster.statement.consortium}, this registry serves {consortium}"
        )
    unknown = [name for name in roster.ids if name not in known]
    if unknown:
        raise FedmeshError(
            Code.NOT_FOUND, f"not registered: {', '.join(unknown)}: register them, then publish the roster again"
        )
    removed = [name for name in roster.ids if known[name].status is HospitalStatus.REMOVED]
    if removed:
        raise FedmeshError(
            Code.WRONG_STATE, f"removed for good: {', '.join(removed)}: they cannot be in a new roster under these ids"
        )


def due_epoch(
    roster_published_at: datetime,
    newest: KeyEpoch | None,
    members: Iterable[Hospital | MemberStanding],
    max_age: timedelta,
    now: datetime,
    public_since: datetime | None = None,
) -> tuple[int, timedelta]:
    """The number of the key epoch to be made now, 0 when none is due, and for how long it has been due.

    members: of the roster. One whose standing changed after the newest epoch makes the next one due at once.
    public_since: since when a plan needs a public key; a newest epoch without one makes the next one due at once.
    """
    if newest is None:
        return 1, max(now - roster_published_at, timedelta())
    if public_since is not None and not newest.has_public_key:
        return newest.epoch + 1, max(now - max(public_since, newest.published_at), timedelta())
    changes = [item.standing_at for item in members if item.standing_at and item.standing_at > newest.published_at]
    if changes:
        return newest.epoch + 1, max(now - min(changes), timedelta())
    late = now - newest.published_at - max_age
    return (newest.epoch + 1, late) if late >= timedelta() else (0, timedelta())


def require_sealed_to_active(said: EpochStatement, barred: Iterable[str], roster: Roster) -> None:
    """The keys of an epoch go to every member that is not barred, and to nobody else.

    Raises: FedmeshError(WRONG_STATE).
    """
    wanted = set(roster.ids) - set(barred)
    if {box.to for box in said.boxes} != wanted:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the keys are to be sealed to {', '.join(sorted(wanted))} and nobody else: ask for the due epoch again",
        )


def require_wanted_public_key(said: EpochStatement, public_since: datetime | None) -> None:
    """Raises: FedmeshError(WRONG_STATE) for an epoch without the public key that an approved plan needs."""
    if public_since is not None and said.public_key is None:
        raise FedmeshError(
            Code.WRONG_STATE,
            "the epoch needs a public key, because an approved plan encrypts with one: bring this node up to date",
        )


def require_epoch_for(plan: Plan, epoch: KeyEpoch) -> None:
    """Refuse to open an attempt under keys with which hospitals cannot encrypt for the plan.

    Raises: FedmeshError(SERVICE_UNAVAILABLE).
    """
    if plan.parameter_set in public_key_sets() and not epoch.has_public_key:
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE,
            f"the plan encrypts under {plan.parameter_set}, and key epoch {epoch.epoch} has no public key: a hospital "
            "makes the next one within minutes, if its node is of a release that knows this set",
        )


def check_survivors(told: SurvivorList, job: Job, roster: Roster, epoch: int | None) -> Survivors:
    """What a list of survivors says, when it is confirmed and belongs to this attempt of this job.

    Raises: FedmeshError(STATEMENT_INVALID) for a list that is not in order, (PRIVACY_REFUSED) below t confirmations,
        (WRONG_STATE) for another attempt, roster or epoch, (INVALID_ARGUMENT) for hospitals outside the cohort.
    """
    said = check_confirmed(told.statement, roster, told.confirmations)
    named = (said.attempt.job_id, said.attempt.round, said.attempt.attempt, said.epoch)
    if named != (str(told.job_id), told.round, told.attempt, epoch):
        raise FedmeshError(Code.WRONG_STATE, "the list of survivors is for another attempt or key epoch")
    strangers = sorted(set(said.sharers) - set(job.hospital_ids))
    if strangers:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"survivors: not in the cohort: {', '.join(strangers)}")
    return said


def require_running(job: Job) -> None:
    """Raises: FedmeshError(WRONG_STATE) when the job has ended."""
    if job.status is not JobStatus.RUNNING:
        raise FedmeshError(Code.WRONG_STATE, f"job {job.job_id} is {job.status.value}", status=job.status.value)


def require_roster(job: Job) -> str:
    """The digest of the roster that the job is bound to.

    Raises: FedmeshError(WRONG_STATE) for a job from before there were rosters.
    """
    if not job.roster_sha256:
        raise FedmeshError(
            Code.WRONG_STATE, f"job {job.job_id} began before there were rosters: cancel it and start another"
        )
    return job.roster_sha256


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
    """Check who is named in a round against the job's cohort and the threshold of its roster.

    At least t contributed and, unless the round is burnt, at least t of them saw the same plaintext.

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
    _require_apart(committed, set(contributors))
    needed = threshold(job.roster_size)
    for field in ("contributions",) if committed.burnt else ("contributions", "agreeing"):
        if len(lists[field]) < needed:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"{field}: {len(lists[field])} hospitals of a roster of {job.roster_size}, {needed} are needed",
                field=field,
            )
    if not committed.burnt and committed.finalizer not in committed.agreeing:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"finalizer {committed.finalizer!r} is not among the agreeing hospitals"
        )


def _require_apart(committed: Round, contributors: set[str]) -> None:
    both = sorted(set(committed.agreeing) & set(committed.dissenting))
    if both:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"agreeing and dissenting at once: {', '.join(both)}")
    outside = sorted({*committed.agreeing, *committed.dissenting} - contributors)
    if outside:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"only survivors send digests, not {', '.join(outside)}", field="agreeing"
        )


def require_survivors(told: Round, survivors: SurvivorList | None, sha256: str, ids: Collection[str]) -> None:
    """A round is made, or burnt, from the list of survivors that was stored for it and from no other.

    sha256, ids: digest of the stored list and the hospitals in it.

    Raises: FedmeshError(WRONG_STATE) when none was stored or it is another one, (INVALID_ARGUMENT) when the
        contributions are not its survivors.
    """
    if survivors is None:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"no survivors were stored for round {told.version}: StoreSurvivors comes before CommitRound",
        )
    if (told.attempt, told.survivors_sha256) != (survivors.attempt, sha256):
        raise FedmeshError(
            Code.WRONG_STATE,
            f"round {told.version} has other survivors, of attempt {survivors.attempt}: complete or burn that one",
            survivors=sha256,
        )
    if {item.hospital_id for item in told.contributions} != set(ids):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "contributions: they are not those of the stored survivors", field="contributions"
        )


def require_burnt_form(job: Job, told: Round) -> None:
    """A burnt version names no finalizer, has no metrics, and keeps the job's state.

    Raises: FedmeshError(INVALID_ARGUMENT).
    """
    if told.finalizer or told.attesting or told.metrics_json:
        raise FedmeshError(Code.INVALID_ARGUMENT, "a burnt round has no finalizer, no attestations and no metrics")
    if told.state_sha256 not in ("", job.state_sha256):
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            "a burnt round keeps the state before it: send that one or none",
            field="state_sha256",
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
        raise FedmeshError(Code.INVALID_ARGUMENT, f"metrics_json: {name[:80]!r} is not a name like auroc")
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
