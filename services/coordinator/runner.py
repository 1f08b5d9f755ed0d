"""Drives one job: looks, decides by the state machine, acts, and waits for the next report.

Every replica has a runner for every running job; the one with the job's lease drives. Whatever a step does outside is
idempotent and happens before the step is stored, so that a replica that takes over repeats it harmlessly.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.tasks import end_tasks
from services.common.telemetry import attempt_span, get_logger
from services.coordinator import metrics
from services.coordinator.domain import machine
from services.coordinator.domain.attempt import OVER, Attempt, AttemptId, Phase, Surroundings
from services.coordinator.domain.events import attempt_events
from services.coordinator.domain.machine import Rules
from services.coordinator.outward import Aggregator, Job, Registry
from services.coordinator.store.redis import Observation, RedisRounds
from services.coordinator.tasks import Tasks, ended_tasks, phase_tasks
from services.plans.manifest import PlanManifest
from services.secure_sum.cohort import threshold

log = get_logger(__name__)

_TICK_S: Final = 1.0
_MIN_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
# A sum outlives its round by this, for hospitals that are still reading it.
_SUM_SPARE_MS: Final = 600_000


@dataclass(frozen=True)
class Settings:
    """actor: the coordinator's SPIFFE id. lease_s, absence_grace_s and so on: see config."""

    actor: str
    lease_s: float
    absence_grace_s: float
    answer_grace_s: float
    max_attempts: int


class _LeaseLostError(Exception):
    """Another replica may drive now."""


class _OutdatedError(Exception):
    """The record is not any more what the step was decided on, or the lease is lost: look again."""


class JobRunner:
    """One job on one replica."""

    def __init__(
        self,
        job_id: str,
        store: RedisRounds,
        registry: Registry,
        aggregator: Aggregator,
        clock: Clock,
        settings: Settings,
    ) -> None:
        self._job_id = job_id
        self._store = store
        self._registry = registry
        self._aggregator = aggregator
        self._clock = clock
        self._settings = settings
        self._wake = asyncio.Event()
        self._owner = ""
        self._job: Job | None = None
        self._manifest: PlanManifest | None = None
        self._recorded: set[str] = set()
        self._recording = asyncio.Lock()
        self._missing_since: dict[str, float] = {}
        self._side: set[asyncio.Task[None]] = set()
        self._over = False

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def doubt(self) -> None:
        """The registry does not list the job as running any more: ask it before the next step."""
        self._job = None
        self._wake.set()

    async def run(self) -> None:
        """Drive until the job has ended and its hospitals know."""
        try:
            await self._drive()
        finally:
            await asyncio.shield(self._release())

    async def _release(self) -> None:
        """Lets another replica go on at once, not only when the lease has run out."""
        if self._owner:
            with suppress(FedmeshError):
                await self._store.release(self._job_id, self._owner)

    async def _drive(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        while not self._over:
            try:
                await self._compete()
                backoff_s = _MIN_BACKOFF_S
            except _LeaseLostError:
                self._owner = ""
            except Exception as error:
                self._note(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _note(self, error: Exception) -> None:
        if isinstance(error, FedmeshError) and error.retryable:
            log.warning("dependency_away", job_id=self._job_id, reason=error.message, code=error.code.value)
        else:
            log.error("step_failed", job_id=self._job_id, exc_info=error)

    async def _compete(self) -> None:
        owner = self._owner or await self._store.acquire(self._job_id)
        if owner is None:
            await self._pause(self._settings.lease_s / 3)
            return
        if owner != self._owner:
            log.info("lease_taken", job_id=self._job_id, owner=owner)
            # Another replica may have gone on since this one last looked.
            self._owner, self._job, self._recorded, self._missing_since = owner, None, set(), {}
        async with self._leading():
            while not self._over:
                self._wake.clear()
                try:
                    wait_s = await self._step()
                except _OutdatedError:
                    continue
                if wait_s > 0:
                    await self._pause(min(wait_s, _TICK_S))

    @asynccontextmanager
    async def _leading(self) -> Any:
        renewing = asyncio.create_task(self._renew())
        metrics.LEASES.inc()
        try:
            yield
        finally:
            metrics.LEASES.dec()
            if self._over:
                await asyncio.gather(*self._side, return_exceptions=True)
            await end_tasks([renewing, *self._side])

    async def _renew(self) -> None:
        # Steps prolong the lease too; this covers the calls in between that take long.
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            try:
                await self._store.renew(self._job_id, self._owner)
            except FedmeshError:
                continue

    async def _pause(self, seconds: float) -> None:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    # ---- one step

    async def _step(self) -> float:
        """Look and act once; seconds to wait before the next step, 0 for none."""
        if self._job is None and not await self._ask():
            return 0
        seen = await self._store.observe(self._job_id, self._owner)
        if seen is None:
            raise _LeaseLostError
        job, attempt = self._job, seen.attempt
        if job is None:
            return 0
        if not job.running:
            await self._finish(job, seen)
            return 0
        manifest = await self._plan(job, seen)
        if manifest is None:
            return 0
        if attempt is None:
            # Nothing is known: the job is new, or the store was lost. Either way begin with a number of one's own.
            await self._open(job, seen, manifest, after=self._owner)
            return 0
        if attempt.round <= job.version and attempt.phase is not Phase.COMMITTED:
            await self._move(seen, self._caught_up(attempt, job))
            return 0
        rules = self._rules(manifest)
        decision = machine.decide(attempt, seen.reports, self._surroundings(seen), rules)
        if isinstance(decision, machine.Wait):
            return max((decision.until_ms - self._now_ms()) / 1000, 0.001)
        await self._act(decision, seen, attempt, job, manifest, rules)
        return 0

    async def _ask(self) -> bool:
        """Fetch the job; False when the registry does not know it, and then there is nothing to drive."""
        try:
            self._job = await self._registry.job(self._job_id)
        except FedmeshError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            await self._store.forget_job(self._job_id)
            self._over = True
        return not self._over

    def _caught_up(self, attempt: Attempt, job: Job) -> Attempt:
        """The attempt as committed, which the registry knows already."""
        state = job.state_sha256 if attempt.round == job.version else attempt.next_state_sha256
        return replace(attempt, next_state_sha256=state).committed(self._now_ms())

    async def _plan(self, job: Job, seen: Observation) -> PlanManifest | None:
        if self._manifest is None:
            try:
                self._manifest = await self._registry.plan(job.plan_id)
            except FedmeshError as error:
                if error.retryable:
                    raise
                await self._end(job, f"the plan cannot be used: {error.message}"[: machine.REASON_LENGTH])
        return self._manifest

    async def _act(
        self,
        decision: machine.Decision,
        seen: Observation,
        attempt: Attempt,
        job: Job,
        manifest: PlanManifest,
        rules: Rules,
    ) -> None:
        now, phase_ends = self._now_ms(), self._now_ms() + rules.phase_ms
        with attempt_span(f"coordinator.{type(decision).__name__.lower()}", *attempt.id):
            match decision:
                case machine.Seal(group):
                    await self._move(seen, attempt.sealed(group, now))
                case machine.OpenSum():
                    await self._guarded(seen, attempt, lambda: self._open_sum(seen, attempt, manifest, rules))
                case machine.CloseSum():
                    await self._guarded(seen, attempt, lambda: self._close_sum(seen, attempt, rules))
                case machine.Finalize(agreeing, dissenting, finalizer):
                    await self._move(seen, attempt.finalizing(agreeing, dissenting, finalizer, now, phase_ends))
                case machine.Attest(sha256, metrics_json):
                    await self._move(seen, attempt.attested_by(sha256, metrics_json, now, phase_ends))
                case machine.Commit(attesting):
                    await self._guarded(
                        seen, attempt, lambda: self._commit(seen, replace(attempt, attesting=attesting))
                    )
                case machine.Abort(reason, fatal):
                    await self._abort(seen, attempt, reason, fatal=fatal)
                case machine.Reopen():
                    await self._reopen(job, seen, attempt, manifest)
                case machine.EndJob(reason):
                    await self._record(attempt)
                    await self._end(job, reason)

    async def _guarded(self, seen: Observation, attempt: Attempt, step: Callable[[], Awaitable[None]]) -> None:
        """A step whose refusal by another service ends the attempt."""
        try:
            await step()
        except FedmeshError as error:
            if error.retryable:
                raise
            self._job = await self._registry.job(self._job_id)
            if self._job.running and self._job.version < attempt.round:
                await self._abort(seen, attempt, error.message[: machine.REASON_LENGTH], fatal=False)

    async def _open_sum(self, seen: Observation, attempt: Attempt, manifest: PlanManifest, rules: Rules) -> None:
        lifetime_ms = 5 * rules.phase_ms * len(attempt.cohort) + _SUM_SPARE_MS
        expires_at = datetime.fromtimestamp((attempt.sealed_ms + min(lifetime_ms, 5 * 86_400_000)) / 1000, UTC)
        self._record_aside(attempt)
        upload_bytes = await self._aggregator.open(attempt, manifest, expires_at)
        now = self._now_ms()
        await self._move(seen, attempt.uploading(upload_bytes, now, now + rules.phase_ms))

    async def _close_sum(self, seen: Observation, attempt: Attempt, rules: Rules) -> None:
        contributions, sum_sha256 = await self._aggregator.close(attempt, threshold(len(attempt.cohort)))
        now = self._now_ms()
        summed = attempt.summed(contributions, sum_sha256, now, now + rules.phase_ms)
        self._record_aside(summed)
        await self._move(seen, summed)

    async def _commit(self, seen: Observation, attempt: Attempt) -> None:
        await self._record(attempt)
        self._job = await self._registry.commit(attempt)
        now = self._now_ms()
        await self._move(seen, attempt.committed(now))
        metrics.ATTEMPTS.labels("committed").inc()
        metrics.OVERHEAD_SECONDS.observe((now - attempt.sealed_ms) / 1000)
        log.info(
            "round_committed",
            job_id=self._job_id,
            round=attempt.round,
            attempt=attempt.attempt,
            contributors=len(attempt.contributions),
            overhead_ms=now - attempt.sealed_ms,
        )
        self._aside(self._discard(attempt.id))

    async def _abort(self, seen: Observation, attempt: Attempt, reason: str, *, fatal: bool) -> None:
        log.warning("attempt_aborted", job_id=self._job_id, round=attempt.round, attempt=attempt.attempt, reason=reason)
        await self._move(seen, attempt.aborted(reason, self._now_ms(), fatal=fatal))
        metrics.ATTEMPTS.labels("aborted").inc()
        self._aside(self._discard(attempt.id))

    async def _reopen(self, job: Job, seen: Observation, attempt: Attempt, manifest: PlanManifest) -> None:
        await self._record(attempt)
        again = attempt.phase is Phase.ABORTED
        after = f"{attempt.round}/{attempt.attempt}"
        await self._open(job, seen, manifest, after=after, before=attempt, reason=attempt.reason if again else "")

    async def _open(
        self,
        job: Job,
        seen: Observation,
        manifest: PlanManifest,
        *,
        after: str,
        before: Attempt | None = None,
        reason: str = "",
    ) -> None:
        try:
            named: AttemptId = await self._registry.open_attempt(job.job_id, job.version + 1, after, reason)
        except FedmeshError as error:
            if error.code is not Code.WRONG_STATE:
                raise
            # The job has ended, or is at another round than this replica thought.
            self._job = None
            return
        now = self._now_ms()
        again = before is not None and before.phase is Phase.ABORTED
        opened = Attempt(
            job_id=named.job_id,
            round=named.round,
            attempt=named.attempt,
            plan_id=job.plan_id,
            base_version=job.version,
            base_state_sha256=job.state_sha256,
            cohort=job.hospital_ids,
            phase=Phase.TRAINING,
            phase_ms=now,
            deadline_ms=now + int(manifest.rounds.ready_deadline_s * 1000),
            failures=before.failures + 1 if before is not None and again else 0,
            spent=before.spent if before is not None else 0,
        )
        await self._move(seen, opened, fresh=True)
        log.info("attempt_opened", job_id=named.job_id, round=named.round, attempt=named.attempt)

    # ---- the end of the job

    async def _end(self, job: Job, reason: str) -> None:
        try:
            self._job = await self._registry.fail_job(job.job_id, reason)
        except FedmeshError as error:
            if error.code is not Code.WRONG_STATE:
                raise
            self._job = None

    async def _finish(self, job: Job, seen: Observation) -> None:
        """The registry has closed the job: tell the hospitals, once."""
        attempt = seen.attempt
        if attempt is None or attempt.ended:
            await self._store.forget_job(job.job_id)
        else:
            how = job.status if not job.reason else f"{job.status}: {job.reason}"
            tasks: Tasks = []
            if attempt.round <= job.version and attempt.phase not in OVER:
                attempt = self._caught_up(attempt, job)
                tasks = phase_tasks(attempt)
            elif attempt.phase not in OVER:
                attempt = attempt.aborted(how, self._now_ms(), fatal=True)
                self._aside(self._discard(attempt.id))
            await self._record(attempt)
            tasks += ended_tasks(attempt, how, job.version, job.state_sha256)
            ended = replace(attempt, ended=True, reason=job.reason)
            if not await self._store.advance(self._owner, seen.version, ended, tasks):
                raise _OutdatedError
        log.info("job_ended", job_id=job.job_id, status=job.status, reason=job.reason)
        self._over = True

    # ---- tools

    async def _move(self, seen: Observation, attempt: Attempt, *, fresh: bool = False) -> None:
        """Store the attempt's next state and hand out its tasks.

        Raises: _OutdatedError when another replica was faster.
        """
        if not await self._store.advance(self._owner, seen.version, attempt, phase_tasks(attempt), fresh=fresh):
            raise _OutdatedError
        before = seen.attempt
        if before is not None and before.phase not in (*OVER, attempt.phase):
            spent_s = (self._now_ms() - before.phase_ms) / 1000
            metrics.PHASE_SECONDS.labels(before.phase.name.lower()).observe(spent_s)

    def _record_aside(self, attempt: Attempt) -> None:
        """Report what has happened while hospitals work; `_record` makes up for what fails here."""
        self._aside(self._record(attempt))

    async def _record(self, attempt: Attempt) -> None:
        """Make the attempt's events durable, as far as this replica has not seen to it already."""
        async with self._recording:
            told = attempt_events(attempt, self._settings.actor)
            events = [item for item in told if item.event_id not in self._recorded]
            if events:
                await self._registry.record(events)
                self._recorded.update(item.event_id for item in events)

    async def _discard(self, attempt: AttemptId) -> None:
        await self._aggregator.discard(attempt)

    def _aside(self, work: Any) -> None:
        task = asyncio.create_task(_quietly(work))
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    def _rules(self, manifest: PlanManifest) -> Rules:
        return Rules(
            ready_ms=int(manifest.rounds.ready_deadline_s * 1000),
            phase_ms=int(manifest.rounds.phase_deadline_s * 1000),
            absence_grace_ms=int(self._settings.absence_grace_s * 1000),
            answer_grace_ms=int(self._settings.answer_grace_s * 1000),
            max_attempts=self._settings.max_attempts,
            extra_attempts=manifest.privacy.extra_attempts if manifest.privacy is not None else None,
        )

    def _surroundings(self, seen: Observation) -> Surroundings:
        cohort = seen.attempt.cohort if seen.attempt is not None else ()
        now = time.monotonic()
        missing = set(cohort) - seen.connected
        self._missing_since = {name: self._missing_since.get(name, now) for name in missing}
        absent = {name: int((now - since) * 1000) for name, since in self._missing_since.items()}
        return Surroundings(self._now_ms(), absent, seen.declined)

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


async def _quietly(work: Awaitable[None]) -> None:
    try:
        await work
    except FedmeshError as error:
        log.info("work_aside_failed", reason=error.message, code=error.code.value)
