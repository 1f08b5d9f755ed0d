"""Committed rounds, model versions, metrics, and the events of other services."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.plans.manifest import read_manifest
from services.registry.domain.entities import CommittedRound, Event, Job, JobStatus, Metric, ModelVersion, Page, Round
from services.registry.domain.events import event
from services.registry.domain.lineage import committed_facts, contributions_root
from services.registry.domain.performance import of_round
from services.registry.domain.promotion import Rollback, diverged
from services.registry.domain.rules import (
    parse_metrics,
    require_burnt_form,
    require_newest_attempt,
    require_next_version,
    require_quorum,
    require_roster,
    require_running,
    require_survivors,
)
from services.registry.usecases.attestations import Attestor
from services.registry.usecases.jobs import end_job, find_job, require_job
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction
from services.secure_sum.statements import Survivors, parse
from services.transparency.canonical import canonical_json


class RoundUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock, attestor: Attestor) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._attestor = attestor

    async def commit(self, command: Command[Job], told: Round) -> bytes:
        """Make the next version of a job, exactly once; the last round completes the job.

        A burnt round uses its version up and keeps the state before it. The very same round under another request id
        gets the job as it stands.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) for another version, an older attempt, an ended job, a state
            that was not stored for this job or other survivors than those stored, (INVALID_ARGUMENT) for hospitals or
            metrics that cannot be.
        """
        metrics = parse_metrics(told.metrics_json)
        told = replace(told, metrics_json=canonical_json(dict(metrics)).decode() if metrics else "")

        async def body(tx: Transaction) -> Job:
            job = await find_job(tx, told.job_id, lock=True)
            if told.version <= job.version and await tx.rounds.content_sha256(told.job_id, told.version) == (
                told.content_sha256
            ):
                return job
            require_running(job)
            require_roster(job)
            require_next_version(job, told.version, "version")
            newest, _ = await tx.jobs.newest_attempt(told.job_id, told.version)
            require_newest_attempt(told.attempt, newest)
            require_quorum(job, told)
            await _require_stored_survivors(tx, told)
            if told.burnt:
                require_burnt_form(job, told)
                return await self._store_round(tx, command.caller, job, replace(told, state_sha256=job.state_sha256))
            await _require_stored_state(tx, told)
            return await self._store_round(tx, command.caller, job, told, metrics)

        return await self._mutations.run(command, body)

    async def _store_round(
        self,
        tx: Transaction,
        caller: Identity,
        job: Job,
        told: Round,
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> Job:
        now = self._clock.now()
        committed = CommittedRound(told, contributions_root(told), now)
        before, job = job, replace(job, version=told.version, state_sha256=told.state_sha256)
        kind = "round.burnt" if told.burnt else "round.committed"
        telling = event(kind, now, caller, f"job/{job.job_id}", **committed_facts(job, committed))
        committed = replace(committed, event_id=telling.event_id)
        await tx.rounds.add(committed, metrics)
        await tx.performance.add(of_round(job, committed))
        await tx.survivors.drop_details(job.job_id)
        await tx.outbox.add([telling])
        if not told.burnt:
            await self._attestor.attest(tx, caller, before, committed)
        back = await self._rolled_back(tx, caller, job, metrics)
        if back is not None:
            reason = f"diverged, version {back.good_version} is the result: {back.reason}"[:500]
            return await end_job(tx, job, caller, JobStatus.FAILED, reason, now)
        if told.version < job.rounds:
            return job
        if not job.state_sha256:
            reason = "every round was burnt: there is no model; see `fedmesh rounds` for the reasons"
            return await end_job(tx, job, caller, JobStatus.FAILED, reason, now)
        return await end_job(tx, job, caller, JobStatus.COMPLETED, "", now)

    async def _rolled_back(
        self, tx: Transaction, caller: Identity, job: Job, metrics: Mapping[str, float]
    ) -> Rollback | None:
        """The roll-back that this round's measurement calls for by the plan's bound, recorded; mostly None."""
        if "auroc" not in metrics:
            return None
        plan = await tx.plans.get(job.plan_id)
        assert plan is not None, "a foreign key holds the plan"
        checks = read_manifest(plan.manifest).checks
        found = None if checks is None else diverged(checks, await tx.promotions.measurements(job.job_id))
        if found is None:
            return None
        now = self._clock.now()
        back = Rollback(job.job_id, *found, now)
        await tx.promotions.add_rollback(back)
        facts = {"diverged_version": back.diverged_version, "good_version": back.good_version, "reason": back.reason}
        await tx.outbox.add([event("model.rolled_back", now, caller, f"job/{job.job_id}", **facts)])
        return back

    async def list(self, caller: Identity, job_id: UUID, after: int, size: int) -> tuple[CommittedRound, ...]:
        """Raises: FedmeshError(NOT_FOUND)."""

        found = await self._store.ask("ListRounds", caller, lambda tx: tx.rounds.after(job_id, after, size))
        if not found:
            await require_job(self._store, "ListRounds.job", caller, job_id)
        return found

    async def entry(self, caller: Identity, job_id: UUID, version: int) -> tuple[UUID, int]:
        """The event that tells of a round, and its index in the audit log.

        Raises: FedmeshError(NOT_FOUND) when there is no such round, or one from before there were receipts;
            (WRONG_STATE) when the log does not hold it yet.
        """

        found = await self._store.ask("GetRoundEntry", caller, lambda tx: tx.rounds.after(job_id, version - 1, 1))
        if not found or found[0].round.version != version:
            await require_job(self._store, "GetRoundEntry.job", caller, job_id)
            raise FedmeshError(Code.NOT_FOUND, f"job {job_id} has no round {version} yet")
        event_id = found[0].event_id
        if event_id is None:
            raise FedmeshError(Code.NOT_FOUND, f"round {version} is of a release that made no receipts")
        # The outbox is the consortium's; of it, this one number about a round that the caller was found to see.
        index = await self._store.ask("GetRoundEntry.index", None, lambda tx: tx.outbox.index(event_id))
        if index is None:
            raise FedmeshError(Code.WRONG_STATE, f"the audit log does not hold round {version} yet: try again soon")
        return event_id, index

    async def model_version(self, caller: Identity, job_id: UUID, version: int) -> ModelVersion:
        """One version, the newest when `version` is 0.

        Raises: FedmeshError(NOT_FOUND).
        """

        found = await self._store.ask(
            "GetModelVersion", caller, lambda tx: tx.rounds.model_version(job_id, version or None)
        )
        if found is None:
            await require_job(self._store, "GetModelVersion.job", caller, job_id)
            raise FedmeshError(Code.NOT_FOUND, f"job {job_id} has no version {version or 'yet'}")
        return found

    async def model_versions(
        self, caller: Identity, job_id: UUID | None, size: int, before: int | None
    ) -> Page[tuple[int, ModelVersion]]:
        return await self._store.ask("ListModelVersions", caller, lambda tx: tx.rounds.page(job_id, size, before))

    async def metrics(self, caller: Identity, job_id: UUID, name: str | None) -> tuple[Metric, ...]:
        """Raises: FedmeshError(NOT_FOUND)."""

        found = await self._store.ask("ListMetrics", caller, lambda tx: tx.rounds.metrics(job_id, name))
        if not found:
            await require_job(self._store, "ListMetrics.job", caller, job_id)
        return found

    async def record_events(self, command: Command[None], events: Sequence[Event]) -> bytes:
        """Take over the events of another service; they are durable when this returns."""

        async def body(tx: Transaction) -> None:
            await tx.outbox.add(events)

        return await self._mutations.run(command, body)


async def _require_stored_survivors(tx: Transaction, told: Round) -> None:
    survivors = await tx.survivors.get(told.job_id, told.version)
    statement = b"" if survivors is None else survivors.statement
    ids = parse(Survivors, statement).ids if statement else ()
    require_survivors(told, survivors, hashlib.sha256(statement).hexdigest(), ids)


async def _require_stored_state(tx: Transaction, told: Round) -> None:
    if await tx.blobs.size_in_job(told.job_id, told.state_sha256) is None:
        raise FedmeshError(Code.WRONG_STATE, f"state {told.state_sha256} was not stored for this job: upload it")
