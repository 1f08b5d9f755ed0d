"""Jobs and their attempts."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.registry.domain.entities import Event, Job, JobStatus, KeyEpoch, OpenedAttempt, Page
from services.registry.domain.events import event
from services.registry.domain.rules import (
    require_cohort,
    require_epoch_for,
    require_next_version,
    require_roster,
    require_running,
)
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


async def require_job(store: Store, name: str, caller: Identity, job_id: UUID) -> Job:
    """As `find_job`, in a transaction of its own: for a read that found nothing, because only then it matters why.

    Raises: FedmeshError(NOT_FOUND).
    """
    return await store.ask(name, caller, lambda tx: find_job(tx, job_id))


class JobUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

    async def create(self, command: Command[Job], plan_id: str, hospital_ids: Sequence[str]) -> bytes:
        """Start a job, bound to the present roster; the request's id becomes the job's.

        Raises: FedmeshError(NOT_FOUND | WRONG_STATE | INVALID_ARGUMENT | PRIVACY_REFUSED) as `require_cohort`.
        """

        async def body(tx: Transaction) -> Job:
            plan = await tx.plans.get(plan_id)
            if plan is None:
                raise FedmeshError(Code.NOT_FOUND, f"there is no plan {plan_id}")
            # Locked and touched, so that a suspension or a roster that drops a hospital comes either before the job or
            # after it, and then knows of it.
            known = await tx.hospitals.get(hospital_ids, lock=True)
            present = await tx.rosters.present()
            roster = None if present is None else present.roster
            cohort = require_cohort(plan, hospital_ids, known, roster)
            assert roster is not None
            await tx.hospitals.touch(cohort)
            job = Job(
                job_id=command.request_id,
                plan_id=plan_id,
                plan_name=plan.name,
                private=plan.private,
                hospital_ids=cohort,
                status=JobStatus.RUNNING,
                reason="",
                rounds=plan.rounds,
                version=0,
                state_sha256="",
                created_at=self._clock.now(),
                ended_at=None,
                roster_sha256=roster.sha256,
                roster_size=roster.size,
            )
            await tx.jobs.add(job)
            await tx.outbox.add([_created(job, command.caller)])
            return job

        return await self._mutations.run(command, body)

    async def get(self, caller: Identity, job_id: UUID) -> Job:
        """Raises: FedmeshError(NOT_FOUND)."""
        return await require_job(self._store, "GetJob", caller, job_id)

    async def list(self, caller: Identity, status: JobStatus | None, size: int, before: int | None) -> Page[Job]:
        return await self._store.ask("ListJobs", caller, lambda tx: tx.jobs.page(status, size, before))

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
            return await end_job(tx, job, command.caller, status, reason, self._clock.now())

        return await self._mutations.run(command, body)

    async def open_attempt(
        self, command: Command[OpenedAttempt], job_id: UUID, round_number: int, reason: str
    ) -> bytes:
        """Number the next attempt at the job's next round, and bind it to the newest key epoch of the job's roster.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) when the job has ended, is at another round or already has
            confirmed survivors in it, (SERVICE_UNAVAILABLE) until a member has published a key epoch.
        """

        async def body(tx: Transaction) -> OpenedAttempt:
            job = await find_job(tx, job_id, lock=True)
            require_running(job)
            roster_sha256 = require_roster(job)
            require_next_version(job, round_number, "round")
            await _require_unconfirmed(tx, job_id, round_number)
            epoch = _require_epoch(await tx.rosters.epoch(roster_sha256, None))
            plan = await tx.plans.get(job.plan_id)
            assert plan is not None
            require_epoch_for(plan, epoch)
            newest, _ = await tx.jobs.newest_attempt(job_id, round_number)
            opened = OpenedAttempt(job_id, round_number, newest + 1, roster_sha256, epoch.epoch)
            now = self._clock.now()
            await tx.jobs.touch(job_id)
            await tx.jobs.add_attempt(opened, reason, now)
            facts = {"round": round_number, "attempt": opened.attempt, "reason": reason}
            keys = {"roster_sha256": roster_sha256, "epoch": epoch.epoch}
            await tx.outbox.add([event("attempt.opened", now, command.caller, f"job/{job_id}", **facts, **keys)])
            return opened

        return await self._mutations.run(command, body)


async def _require_unconfirmed(tx: Transaction, job_id: UUID, round_number: int) -> None:
    survivors = await tx.survivors.get(job_id, round_number)
    if survivors is not None:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"round {round_number} has confirmed survivors in attempt {survivors.attempt}: complete that one, or commit"
            " the round as burnt",
            attempt=survivors.attempt,
        )


def _require_epoch(epoch: KeyEpoch | None) -> KeyEpoch:
    if epoch is None:
        raise FedmeshError(
            Code.SERVICE_UNAVAILABLE,
            "the job's roster has no key epoch yet: one of its members makes it within seconds, try again",
        )
    return epoch


async def end_job(tx: Transaction, job: Job, caller: Identity, status: JobStatus, reason: str, at: datetime) -> Job:
    """End a job with its event, and forget the coordinator's records of its attempts."""
    await tx.jobs.end(job.job_id, status, reason, at)
    await tx.survivors.drop_details(job.job_id)
    facts = {"status": status.value, "reason": reason, "version": job.version}
    await tx.outbox.add([event("job.ended", at, caller, f"job/{job.job_id}", **facts)])
    return replace(job, status=status, reason=reason, ended_at=at)


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
        roster_sha256=job.roster_sha256,
    )
