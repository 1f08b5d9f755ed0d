"""Drives one job: looks, decides by the state machine, acts, and waits for the next report.

Every replica has a runner for every running job; the one with the job's lease drives.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from services.common.errors import Code, FedmeshError
from services.common.tasks import end_tasks
from services.common.telemetry import get_logger
from services.coordinator import metrics
from services.coordinator.beginning import begin
from services.coordinator.domain import machine
from services.coordinator.domain.attempt import Phase
from services.coordinator.ending import caught_up, fail_job, finish
from services.coordinator.outward import Job
from services.coordinator.steps import act
from services.coordinator.tenure import Case, OutdatedError, Parts, Tenure
from services.plans.manifest import PlanManifest

log = get_logger(__name__)

_TICK_S: Final = 1.0
_MIN_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0


class _LeaseLostError(Exception):
    """Another replica may drive now."""


class JobRunner:
    """One job on one replica."""

    def __init__(self, job_id: str, parts: Parts) -> None:
        self._job_id = job_id
        self._parts = parts
        self._wake = asyncio.Event()
        self._tenure: Tenure | None = None
        self._over = False

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    def doubt(self) -> None:
        """The registry does not list the job as running any more: ask it before the next step."""
        if self._tenure is not None:
            self._tenure.job = None
        self._wake.set()

    async def run(self) -> None:
        """Drive until the job has ended and its hospitals know."""
        try:
            await self._drive()
        finally:
            await asyncio.shield(self._release())

    async def _release(self) -> None:
        """Lets another replica go on at once, not only when the lease has run out."""
        if self._tenure is not None:
            with suppress(FedmeshError):
                await self._parts.store.release(self._job_id, self._tenure.owner)

    async def _drive(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        while not self._over:
            try:
                await self._compete()
                backoff_s = _MIN_BACKOFF_S
            except _LeaseLostError:
                self._tenure = None
            except Exception as error:
                self._note(error)
                if self._tenure is not None:
                    self._tenure.hindered = isinstance(error, FedmeshError) and error.retryable
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _note(self, error: Exception) -> None:
        if isinstance(error, FedmeshError) and error.retryable:
            log.warning("dependency_away", job_id=self._job_id, reason=error.message, code=error.code.value)
        else:
            log.error("step_failed", job_id=self._job_id, exc_info=error)

    async def _compete(self) -> None:
        if self._tenure is None:
            # What woke it before is over: left set, it would ask for the lease without a pause.
            self._wake.clear()
            owner = await self._parts.store.acquire(self._job_id)
            if owner is None:
                await self._pause(self._parts.settings.lease_s / 3)
                return
            log.info("lease_taken", job_id=self._job_id, owner=owner)
            # Nothing is kept from before: another replica may have gone on since this one last looked.
            self._tenure = Tenure(self._job_id, owner, self._parts)
        async with self._leading(self._tenure) as tenure:
            while not tenure.over:
                self._wake.clear()
                try:
                    wait_s = await self._step(tenure)
                except OutdatedError:
                    continue
                if wait_s > 0:
                    await self._pause(min(wait_s, _TICK_S))
        self._over = tenure.over

    @asynccontextmanager
    async def _leading(self, tenure: Tenure) -> AsyncIterator[Tenure]:
        renewing = asyncio.create_task(self._renew(tenure))
        metrics.LEASES.inc()
        try:
            yield tenure
        finally:
            metrics.LEASES.dec()
            await tenure.end()
            await end_tasks([renewing])

    async def _renew(self, tenure: Tenure) -> None:
        # Steps prolong the lease too; this covers the calls in between that take long.
        while True:
            await asyncio.sleep(self._parts.settings.lease_s / 3)
            try:
                await self._parts.store.renew(self._job_id, tenure.owner)
            except FedmeshError:
                continue

    async def _pause(self, seconds: float) -> None:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _step(self, tenure: Tenure) -> float:
        """Look and act once; seconds to wait before the next step, 0 for none."""
        job = tenure.job or await self._ask(tenure)
        if job is None:
            return 0
        seen = await self._parts.store.observe(self._job_id, tenure.owner)
        if seen is None:
            raise _LeaseLostError
        if not job.running:
            await finish(tenure, job, seen)
            return 0
        manifest = await self._plan(tenure, job)
        if manifest is None:
            return 0
        attempt = seen.attempt
        if attempt is None:
            return await begin(tenure, job, seen, manifest)
        if attempt.round <= job.version and attempt.phase not in (Phase.COMMITTED, Phase.BURNT):
            await tenure.move(seen, caught_up(attempt, job, tenure.now_ms()))
            return 0
        case = Case(tenure, seen, attempt, manifest, tenure.rules(manifest), tenure.surroundings(seen))
        decision = machine.decide(attempt, seen.reports, case.around, case.rules)
        if isinstance(decision, machine.Wait):
            return max((decision.until_ms - tenure.now_ms()) / 1000, 0.001)
        if tenure.hindered and machine.gives_up(decision):
            # What was away here was away for the hospitals too: once it is back, those that still try are let end.
            tenure.job = await self._parts.registry.job(self._job_id)
            await tenure.prolong(case)
            tenure.hindered = False
            return 0
        wait_s = await act(decision, case, job)
        tenure.hindered = False
        return wait_s

    async def _ask(self, tenure: Tenure) -> Job | None:
        """Fetch the job; None when the registry does not know it, and then there is nothing to drive."""
        try:
            tenure.job = await self._parts.registry.job(self._job_id)
        except FedmeshError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            await self._parts.store.forget_job(self._job_id)
            tenure.over = True
        return tenure.job

    async def _plan(self, tenure: Tenure, job: Job) -> PlanManifest | None:
        if tenure.manifest is None:
            try:
                tenure.manifest = await self._parts.registry.plan(job.plan_id)
            except FedmeshError as error:
                if error.retryable:
                    raise
                reason = f"the plan cannot be used: {error.message}"[: machine.REASON_LENGTH]
                await fail_job(tenure, job, reason, machine.Cause.PLAN)
        return tenure.manifest
