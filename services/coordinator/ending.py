"""How attempts and jobs end: committed, burnt, aborted, and the job's last word to its hospitals."""

import asyncio
from dataclasses import replace

from services.common.errors import Code, FedmeshError
from services.common.telemetry import exemplar, get_logger
from services.coordinator import metrics
from services.coordinator.domain import machine
from services.coordinator.domain.attempt import OVER, Agreement, Attempt, Phase
from services.coordinator.outward import Job
from services.coordinator.ports import Observation
from services.coordinator.tasks import Tasks, ended_tasks, phase_tasks
from services.coordinator.tenure import ABORTED, BURNT, COMMITTED, Case, OutdatedError, Tenure

log = get_logger(__name__)


async def commit(case: Case, decision: machine.Commit) -> None:
    tenure = case.tenure
    attempt = note_agreement(case, decision.agreement)
    if not attempt.next_state_sha256:
        attempt = attempt.stated(decision.state_sha256, decision.metrics_json, tenure.now_ms())
    attempt = replace(attempt, attesting=decision.attesting)
    job, recorded = await asyncio.gather(
        tenure.parts.registry.commit(attempt), tenure.record(attempt), return_exceptions=True
    )
    if isinstance(job, FedmeshError) and not job.retryable:
        await _commit_refused(case, attempt, job)
        return
    for answer in (job, recorded):
        if isinstance(answer, BaseException):
            raise answer
    assert isinstance(job, Job)
    tenure.job = job
    now = tenure.now_ms()
    await tenure.move(case.seen, attempt.committed(now))
    tenure.note_end(attempt, COMMITTED)
    metrics.OVERHEAD_SECONDS.observe((now - attempt.sealed_ms) / 1000, exemplar())
    survivors, overhead_ms = len(attempt.contributions), now - attempt.sealed_ms
    log.info("round_committed", contributors=survivors, overhead_ms=overhead_ms, **case.facts)
    tenure.discard_aside(attempt.id)


async def _commit_refused(case: Case, attempt: Attempt, error: FedmeshError) -> None:
    """The finalizer did not store what it said, or the job is over."""
    if not await _still_open(case):
        return
    log.warning("commit_refused", finalizer=attempt.finalizer, reason=error.message, **case.facts)
    before = replace(attempt, next_state_sha256="", metrics_json="", finalized_ms=0, attesting=())
    decision = machine.after_refusal(before, case.around, case.rules, error.message)
    if isinstance(decision, machine.Burn):
        await burn(case, decision.reason)
        return
    await case.tenure.move(case.seen, before.finalizing(decision.finalizer, case.tenure.now_ms(), case.phase_ends_ms()))


async def _still_open(case: Case) -> bool:
    """Ask for the job again: whether it runs and still wants this round."""
    case.tenure.job = job = await case.tenure.parts.registry.job(case.attempt.job_id)
    return job.running and job.version < case.attempt.round


def note_agreement(case: Case, agreement: Agreement) -> Attempt:
    """The attempt with what its hospitals agree on. Whoever saw another sum is named, and does not count."""
    attempt = case.attempt.agreed(agreement, case.tenure.now_ms())
    if agreement.dissenting and agreement != case.attempt.agreement:
        log.warning("hospitals_dissent", hospitals=agreement.dissenting, **case.facts)
    return attempt


async def burn(case: Case, reason: str) -> None:
    """Use up a version whose survivors are stored: the sum of that round is never tried again."""
    tenure, attempt = case.tenure, case.attempt
    log.error("round_burnt", reason=reason, **case.facts)
    try:
        tenure.job = await tenure.parts.registry.burn(attempt, reason)
    except FedmeshError as error:
        if error.retryable or await _still_open(case):
            raise
        return
    await tenure.move(case.seen, attempt.burnt(reason, tenure.now_ms()))
    tenure.note_end(attempt, BURNT)
    tenure.discard_aside(attempt.id)


async def abort(case: Case, reason: str, *, fatal: bool) -> bool:
    """Give the attempt up; False when the registry holds its survivors, and then nothing has changed.

    Redis may have lost the last thing that was written to it, and that may have been just this.
    """
    tenure, attempt = case.tenure, case.attempt
    if not attempt.bound and attempt.group and await tenure.parts.registry.survivors(attempt.job_id) is not None:
        return False
    log.warning("attempt_aborted", reason=reason, **case.facts)
    await tenure.move(case.seen, attempt.aborted(reason, tenure.now_ms(), fatal=fatal))
    tenure.note_end(attempt, ABORTED)
    tenure.discard_aside(attempt.id)
    return True


async def give_up(case: Case, error: FedmeshError) -> bool:
    """Another service refused a step for good: end the attempt, unless the job is over anyway. As `abort`."""
    if error.retryable:
        raise error
    return not await _still_open(case) or await abort(case, error.message[: machine.REASON_LENGTH], fatal=False)


async def fail_job(tenure: Tenure, job: Job, reason: str, cause: machine.Cause) -> None:
    try:
        tenure.job = await tenure.parts.registry.fail_job(job.job_id, reason)
    except FedmeshError as error:
        if error.code is not Code.WRONG_STATE:
            raise
        tenure.job = None
        return
    metrics.JOBS_FAILED.labels(cause.value).inc()


def caught_up(attempt: Attempt, job: Job, now_ms: int) -> Attempt:
    """The attempt as it ended in the registry, which is ahead of what is known here."""
    if attempt.round == job.version and job.state_sha256 == attempt.base_state_sha256:
        return attempt.burnt("the version was used up", now_ms)
    state = job.state_sha256 if attempt.round == job.version else attempt.next_state_sha256
    return replace(attempt, next_state_sha256=state).committed(now_ms)


async def finish(tenure: Tenure, job: Job, seen: Observation) -> None:
    """The registry has closed the job: tell the hospitals, once."""
    attempt, store = seen.attempt, tenure.parts.store
    if attempt is None or attempt.ended:
        await store.forget_job(job.job_id)
    else:
        how = job.status if not job.reason else f"{job.status}: {job.reason}"
        tasks: Tasks = []
        if attempt.round <= job.version and attempt.phase not in OVER:
            attempt = caught_up(attempt, job, tenure.now_ms())
            tasks = phase_tasks(attempt)
        elif attempt.phase not in OVER:
            attempt = attempt.aborted(how, tenure.now_ms(), fatal=True)
            tenure.discard_aside(attempt.id)
        await tenure.record(attempt)
        tasks += ended_tasks(attempt, how, job.version, job.state_sha256)
        ended = replace(attempt, ended=True, reason=job.reason)
        if not await store.advance(tenure.owner, seen.version, ended, tasks):
            raise OutdatedError
        if attempt.phase is Phase.ABORTED:
            tenure.note_round_end(attempt, ABORTED)
    log.info("job_ended", job_id=job.job_id, status=job.status, reason=job.reason)
    tenure.over = True
