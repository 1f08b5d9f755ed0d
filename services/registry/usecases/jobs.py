"""Jobs and their attempts."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.registry.domain.entities import Event, Job, JobStatus, Page
from services.registry.domain.events import event
from services.registry.domain.rules import require_cohort, require_next_version, require_running
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction


async def find_job(tx: Transaction, job_id: UUID, *, lock: bool = False) -> Job:
    """The job, if the caller may see it.

    Raises: FedmeshError(NOT_FOUND), also for a hospital that does not take part: it learns nothing about the job.
    """
    job = await tx.jobs.get(job_id, lock=lock)
    if job is None:
        raise FedmeshError(Code.NOT_FOUND, f"there is no job {job_id}")
    return job


class JobUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

    async def create(self, command: Command[Job], plan_id: str, hospital_ids: Sequence[str]) -> bytes:
        """Start a job; the request's id becomes the job's.

        Raises: FedmeshError(NOT_FOUND | WRONG_STATE | INVALID_ARGUMENT | PRIVACY_REFUSED) as `require_cohort`.
        """

        async def body(tx: Transaction) -> Job:
            plan = await tx.plans.get(plan_id)
            if plan is None:
                raise FedmeshError(Code.NOT_FOUND, f"there is no plan {plan_id}")
            # Locked, so that a suspension comes either before the job or after it.
            known = await tx.hospitals.get(hospital_ids, lock=True)
            job = Job(
                job_id=command.request_id,
                plan_id=plan_id,
                plan_name=plan.name,
                private=plan.private,
                hospital_ids=require_cohort(plan, hospital_ids, known),
                status=JobStatus.RUNNING,
                reason="",
                rounds=plan.rounds,
                version=0,
                state_sha256="",
                created_at=self._clock.now(),
                ended_at=None,
            )
            await tx.jobs.add(job)
            await tx.outbox.add([_created(job, command.caller)])
            return job

        return await self._mutations.run(command, body)

    async def get(self, caller: Identity, job_id: UUID) -> Job:
        """Raises: FedmeshError(NOT_FOUND)."""
        return await self._store.run("GetJob", caller, lambda tx: find_job(tx, job_id))

    async def list(self, caller: Identity, status: JobStatus | None, size: int, before: int | None) -> Page[Job]:
        return await self._store.run("ListJobs", caller, lambda tx: tx.jobs.page(status, size, before))

    async def end(self, command: Command[Job], job_id: UUID, status: JobStatus, reason: str) -> bytes:
        """Stop a job before its last round: the coordinator when it failed, an operator when it is cancelled.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) when it has ended, (PERMISSION_DENIED) for the other's ending.
        """
        operator = command.caller.kind is Kind.OPERATOR
        if status is not (JobStatus.CANCELLED if operator else JobStatus.FAILED):
            raise FedmeshError(
                Code.PERMISSION_DENIED,
                "an operator ends a job as CANCELLED, the coordinator as FAILED",
                asked=status.value,
            )

        async def body(tx: Transaction) -> Job:
            job = await find_job(tx, job_id, lock=True)
            require_running(job)
            now = self._clock.now()
            await tx.jobs.end(job_id, status, reason, now)
            await tx.outbox.add([ended_event(job, command.caller, status, reason, now)])
            return replace(job, status=status, reason=reason, ended_at=now)

        return await self._mutations.run(command, body)

    async def open_attempt(
        self, command: Command[tuple[UUID, int, int]], job_id: UUID, round_number: int, reason: str
    ) -> bytes:
        """Number the next attempt at the job's next round: (job, round, attempt).

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) when the job has ended or is at another round.
        """

        async def body(tx: Transaction) -> tuple[UUID, int, int]:
            job = await find_job(tx, job_id, lock=True)
            require_running(job)
            require_next_version(job, round_number, "round")
            attempt = await tx.jobs.newest_attempt(job_id, round_number) + 1
            now = self._clock.now()
            await tx.jobs.add_attempt(job_id, round_number, attempt, reason, now)
            facts = {"round": round_number, "attempt": attempt, "reason": reason}
            await tx.outbox.add([event("attempt.opened", now, command.caller, f"job/{job_id}", **facts)])
            return job_id, round_number, attempt

        return await self._mutations.run(command, body)


def _created(job: Job, caller: Identity) -> Event:
    return event(
        "job.created",
        job.created_at,
        caller,
        f"job/{job.job_id}",
        plan_id=job.plan_id,
        private=job.private,
        rounds=job.rounds,
        hospitals=list(job.hospital_ids),
    )


def ended_event(job: Job, caller: Identity, status: JobStatus, reason: str, at: datetime) -> Event:
    """The event that closes a job's trail."""
    return event("job.ended", at, caller, f"job/{job.job_id}", status=status.value, reason=reason, version=job.version)
