"""How attempts begin: with a number from the registry, or from what the registry kept of one that was lost."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.coordinator import details
from services.coordinator.domain.attempt import Attempt, Contribution, Counted, Phase
from services.coordinator.domain.machine import Rules
from services.coordinator.domain.stored import parse_statement, sealed_statement
from services.coordinator.outward import Job, StoredSurvivors
from services.coordinator.ports import Observation
from services.coordinator.shelf import advert_field, confirmation_field, share_field, upload_field
from services.coordinator.tasks import Papers
from services.coordinator.tenure import Tenure
from services.coordinator.wire import listed_uploads
from services.plans.manifest import PlanManifest
from services.secure_sum.statements import Signed, Survivors, parse

log = get_logger(__name__)

_LATER_S: Final = 1.0
# A sum outlives its round by this, for hospitals that are still reading it.
_SUM_SPARE_MS: Final = 600_000
_SUM_MOST_MS: Final = 5 * 86_400_000


def sum_expires_at(attempt: Attempt, rules: Rules, now_ms: int) -> datetime:
    """When an attempt's sum may be forgotten: the same moment whenever it is asked for, unless that is over."""
    lifetime_ms = min(5 * rules.phase_ms * len(attempt.cohort) + _SUM_SPARE_MS, _SUM_MOST_MS)
    ends_ms = attempt.sealed_ms + lifetime_ms
    if ends_ms < now_ms + rules.phase_ms:
        ends_ms = now_ms + lifetime_ms
    return datetime.fromtimestamp(ends_ms / 1000, UTC)


async def begin(tenure: Tenure, job: Job, seen: Observation, manifest: PlanManifest) -> float:
    """Nothing is known of the job's round: it is new, or the store was lost. Seconds until it is worth trying again."""
    stored = await tenure.parts.registry.survivors(job.job_id)
    if stored is not None:
        await rebuild(tenure, job, seen, manifest, stored)
        return 0
    # Begin with a number of one's own.
    return await open_attempt(tenure, job, seen, manifest, after=tenure.owner)


async def open_attempt(
    tenure: Tenure, job: Job, seen: Observation, manifest: PlanManifest, *, after: str, before: Attempt | None = None
) -> float:
    """Number the next attempt and ask the cohort to train. after: names what it follows.

    Returns seconds to wait where none can open yet, because there is no roster or no key epoch.
    """
    registry = tenure.parts.registry
    again = before if before is not None and before.phase is Phase.ABORTED else None
    try:
        opened = await registry.open_attempt(job.job_id, job.version + 1, after, again.reason if again else "")
        roster = await tenure.parts.rosters.get(opened.roster_sha256)
    except FedmeshError as error:
        return await _not_opened(tenure, job, seen, manifest, error)
    now = tenure.now_ms()
    attempt = Attempt(
        job_id=opened.id.job_id,
        round=opened.id.round,
        attempt=opened.id.attempt,
        plan_id=job.plan_id,
        base_version=job.version,
        base_state_sha256=job.state_sha256,
        cohort=job.hospital_ids,
        phase=Phase.TRAINING,
        phase_ms=now,
        deadline_ms=now + tenure.rules(manifest).ready_ms,
        roster_sha256=roster.sha256,
        roster_size=roster.size,
        epoch=opened.epoch,
        failures=again.failures + 1 if again else 0,
        spent=before.spent if before is not None else 0,
        enough=manifest.rounds.k or 0,
        oldest=manifest.rounds.oldest,
    )
    await tenure.move(seen, attempt, fresh=True)
    log.info("attempt_opened", job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt, epoch=attempt.epoch)
    return 0


async def _not_opened(
    tenure: Tenure, job: Job, seen: Observation, manifest: PlanManifest, error: FedmeshError
) -> float:
    if error.code is not Code.WRONG_STATE and not error.retryable:
        raise error
    if error.code is Code.WRONG_STATE:
        tenure.job = now = await tenure.parts.registry.job(job.job_id)
        if not now.running or now.version != job.version:
            return 0
        stored = await tenure.parts.registry.survivors(job.job_id)
        if stored is not None:
            await rebuild(tenure, now, seen, manifest, stored)
            return 0
    log.warning("attempt_not_opened", job_id=job.job_id, reason=error.message, code=error.code.value)
    await tenure.parts.store.note(job.job_id, tenure.owner, f"the next attempt cannot open yet: {error.message}")
    return _LATER_S


async def rebuild(
    tenure: Tenure,
    job: Job,
    seen: Observation,
    manifest: PlanManifest,
    stored: StoredSurvivors,
    *,
    returned: int = 0,
) -> None:
    """Go on with an attempt whose survivors are stored: with its uploads where the sum is still there, or after the
    survivors have sent the same bytes again. Where that cannot be, its version is burnt.

    returned: how often this has been tried before.
    """
    rules = tenure.rules(manifest)
    try:
        attempt, statements = _restored(stored, returned + 1)
        roster = await tenure.parts.rosters.get(attempt.roster_sha256)
        now = tenure.now_ms()
        expires_at = sum_expires_at(attempt, rules, now)
        upload_bytes = await tenure.parts.aggregator.open(attempt, manifest, roster, expires_at)
        counted = await tenure.parts.aggregator.closed(attempt.id)
    except FedmeshError as error:
        if error.retryable:
            raise
        log.error("attempt_not_rebuilt", job_id=job.job_id, reason=error.message)
        await tenure.move(seen, _hopeless(tenure, job, stored, error.message), fresh=True)
        return
    now = tenure.now_ms()
    if all_counted(attempt, counted):
        going_on = attempt.confirmed(attempt.confirming, now, now + rules.phase_ms)
    else:
        going_on = attempt.uploading(upload_bytes, now, now + rules.phase_ms)
    papers = _papers(attempt, statements, stored)
    await tenure.move(seen, going_on, papers, fresh=True, statements=statements)
    log.warning(
        "attempt_rebuilt",
        job_id=attempt.job_id,
        round=attempt.round,
        attempt=attempt.attempt,
        phase=going_on.phase.name.lower(),
    )


def all_counted(attempt: Attempt, counted: Iterable[Counted]) -> bool:
    """Whether every survivor is counted under the very `upload` statement that the list of survivors names."""
    return listed_uploads(attempt).items() <= {(item.hospital_id, item.upload_sha256) for item in counted}


def _restored(stored: StoredSurvivors, returned: int) -> tuple[Attempt, dict[str, bytes]]:
    attempt, statements = details.unpack(stored.details)
    if attempt.id != stored.attempt or attempt.survivors.encode() != stored.statement:
        raise FedmeshError(Code.DATA_INVALID, "the stored record belongs to another list of survivors")
    for name, signature in stored.confirmations.items():
        statements[confirmation_field(name)] = sealed_statement(Signed(name, b"", signature))
    return replace(attempt, confirming=tuple(sorted(stored.confirmations)), returned=returned), statements


def _hopeless(tenure: Tenure, job: Job, stored: StoredSurvivors, reason: str) -> Attempt:
    """What is left of an attempt that cannot go on: enough to burn its version."""
    said = parse(Survivors, stored.statement)
    now = tenure.now_ms()
    return Attempt(
        job_id=stored.attempt.job_id,
        round=stored.attempt.round,
        attempt=stored.attempt.attempt,
        plan_id=job.plan_id,
        base_version=job.version,
        base_state_sha256=job.state_sha256,
        cohort=job.hospital_ids,
        phase=Phase.UNMASK,
        phase_ms=now,
        deadline_ms=now,
        roster_sha256=said.roster,
        roster_size=max(len(job.hospital_ids), 1),
        epoch=said.epoch,
        sharers=said.sharers,
        sealed_ms=now,
        # Which ciphertexts they were is lost; for a burnt version the names of their statements do as well.
        contributions=tuple(Contribution(item.hospital_id, item.upload) for item in said.survivors),
        survivors=stored.statement.decode("ascii"),
        confirming=tuple(sorted(stored.confirmations)),
        confirmed_ms=now,
        unopened=1,
        trouble=reason,
    )


def _papers(attempt: Attempt, statements: dict[str, bytes], stored: StoredSurvivors) -> Papers:
    def signed(field: str, name: str) -> Signed:
        return parse_statement(name, statements[field])

    return Papers(
        adverts=[signed(advert_field(name), name) for name in attempt.group],
        shares={
            name: [signed(share_field(sender, name), sender) for sender in attempt.sharers if sender != name]
            for name in attempt.survivor_ids
        },
        uploads=[signed(upload_field(name), name) for name in attempt.survivor_ids],
        confirmations=stored.confirmations,
    )
