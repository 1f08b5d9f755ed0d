"""Model versions after they are made: aliases, tags, what hospitals found of them, and promotion by two people."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.plans.manifest import read_manifest
from services.registry.domain.entities import Event, Job
from services.registry.domain.events import event
from services.registry.domain.performance import of_checks
from services.registry.domain.promotion import (
    Alias,
    Attestation,
    Check,
    CheckReport,
    Evidence,
    Promotion,
    Rollback,
    Spending,
    Tag,
    evaluate,
    move_event_id,
    require_open,
    require_other_person,
    require_plain_alias,
    require_promotable,
)
from services.registry.usecases.attestations import Attestor
from services.registry.usecases.jobs import find_job, require_job
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction
from services.transparency.findings import Findings, open_findings

T = TypeVar("T")

_MOST_ROUNDS: Final = 10_000


@dataclass(frozen=True)
class Provenance:
    """What is recorded of a version besides its round. charges: of operators' answers only."""

    attestation: Attestation | None
    checks: tuple[Check, ...]
    reports: tuple[CheckReport, ...]
    promotions: tuple[Promotion, ...]
    aliases: tuple[Alias, ...]
    tags: tuple[Tag, ...]
    rollback: Rollback | None
    spending: Spending


class PromotionUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock, attestor: Attestor) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._attestor = attestor

    async def set_alias(self, command: Command[Alias], job_id: UUID, version: int, alias: str) -> bytes:
        """Point an alias at a version.

        Raises: FedmeshError(NOT_FOUND), (PERMISSION_DENIED) for an alias that moves by promotion only.
        """

        async def body(tx: Transaction) -> Alias:
            require_plain_alias(alias)
            job = await _job_with(tx, job_id, version)
            moved = Alias(job.plan_name, alias, job_id, version, str(command.caller), self._clock.now(), None)
            await self._move(tx, command.caller, job, moved)
            return moved

        return await self._noting(command, f"job/{job_id}", body)

    async def aliases(self, caller: Identity, model: str) -> tuple[Alias, ...]:
        return await self._store.ask("ListAliases", caller, lambda tx: tx.promotions.aliases(model))

    async def set_tag(
        self, command: Command[tuple[Tag, ...]], job_id: UUID, version: int, key: str, value: str
    ) -> bytes:
        """Set a tag, or remove it by an empty value.

        Raises: FedmeshError(NOT_FOUND).
        """

        async def body(tx: Transaction) -> tuple[Tag, ...]:
            await _job_with(tx, job_id, version)
            now = self._clock.now()
            await tx.promotions.set_tag(job_id, version, Tag(key, value, str(command.caller), now))
            facts = {"version": version, "tag": key, "value": value}
            await tx.outbox.add([event("model.tagged", now, command.caller, f"job/{job_id}", **facts)])
            return await tx.promotions.tags(job_id, version)

        return await self._mutations.run(command, body)

    async def report(self, command: Command[None], job_id: UUID, report: CheckReport) -> bytes:
        """Store what the calling hospital found of a version of a job that it takes part in; its first word stands.

        Raises: FedmeshError(NOT_FOUND), (STATEMENT_INVALID) for a report that is not in order, not signed by its key in
            the job's roster, or of another state, (WRONG_STATE) when it said something else before.
        """

        async def body(tx: Transaction) -> None:
            job = await _job_with(tx, job_id, report.version)
            found = await self._opened(tx, job, report)
            told = await tx.rounds.model_version(job_id, report.version)
            assert told is not None
            if found.state_sha256 != told.committed.round.state_sha256:
                raise FedmeshError(Code.STATEMENT_INVALID, "the report is about another state than the version has")
            known = await tx.promotions.reports(job_id, report.version)
            before = [item for item in known if item.hospital_id == report.hospital_id]
            if before:
                if before[0].statement != report.statement:
                    raise FedmeshError(Code.WRONG_STATE, "another report of this hospital on this version stands")
                return
            now = self._clock.now()
            await tx.promotions.add_report(report, now)
            await tx.performance.add(of_checks(found, job_id, now))
            facts = {
                "version": report.version,
                "hospital_id": report.hospital_id,
                "report_sha256": hashlib.sha256(report.statement).hexdigest(),
                "results": {item.check: item.passed for item in found.findings},
            }
            await tx.outbox.add([event("model.checked", now, command.caller, f"job/{job_id}", **facts)])

        return await self._noting(command, f"job/{job_id}", body)

    async def propose(self, command: Command[Promotion], job_id: UUID, version: int, alias: str, reason: str) -> bytes:
        """Propose to promote a version; the request's id becomes the promotion's.

        reason: sets the failed divergence check of a version that a roll-back took away aside; empty for any other.

        Raises: FedmeshError(NOT_FOUND), (PRIVACY_REFUSED) without privacy, (WRONG_STATE) naming the checks that block,
            (INVALID_ARGUMENT) for a reason with nothing to set aside.
        """

        async def body(tx: Transaction) -> Promotion:
            seen = await self._evidence(tx, job_id, version)
            checks = evaluate(seen)
            require_promotable(checks, reason)
            now = self._clock.now()
            promotion = Promotion(
                promotion_id=command.request_id,
                model=seen.plan.name,
                alias=alias,
                job_id=job_id,
                version=version,
                proposed_by=str(command.caller),
                proposed_at=now,
                proposal_verdict=self._attestor.sign_verdict(seen, checks, reason),
            )
            await tx.promotions.add(promotion)
            await tx.outbox.add([_told("promotion.proposed", promotion, command.caller, promotion.proposal_verdict)])
            return promotion

        return await self._noting(command, f"job/{job_id}", body)

    async def approve(self, command: Command[Promotion], promotion_id: UUID) -> bytes:
        """Approve a proposal as another person than the one who made it: checks once more, then moves the alias.

        Raises: FedmeshError(NOT_FOUND), (PERMISSION_DENIED) for the one who proposed, (WRONG_STATE) when it is approved
            already or a check blocks now.
        """

        async def body(tx: Transaction) -> Promotion:
            promotion = await tx.promotions.get(promotion_id)
            if promotion is None:
                raise FedmeshError(Code.NOT_FOUND, f"there is no promotion {promotion_id}")
            require_other_person(promotion, str(command.caller))
            require_open(promotion)
            seen = await self._evidence(tx, promotion.job_id, promotion.version)
            checks = evaluate(seen)
            require_promotable(checks, promotion.reason)
            now = self._clock.now()
            verdict = self._attestor.sign_verdict(seen, checks, promotion.reason)
            approved = replace(promotion, approved_by=str(command.caller), approved_at=now, approval_verdict=verdict)
            await tx.promotions.approve(approved)
            moved = Alias(
                promotion.model,
                promotion.alias,
                promotion.job_id,
                promotion.version,
                str(command.caller),
                now,
                promotion_id,
            )
            await tx.outbox.add([_told("promotion.approved", approved, command.caller, verdict)])
            await self._move(tx, command.caller, seen.job, moved)
            return approved

        return await self._noting(command, f"promotion/{promotion_id}", body)

    async def provenance(self, caller: Identity, job_id: UUID, version: int) -> Provenance:
        """What is recorded of a version, the newest when `version` is 0. A hospital is told nothing of others' ledgers.

        Raises: FedmeshError(NOT_FOUND), also for a hospital that does not take part in the job.
        """
        job = await require_job(self._store, "GetProvenance.check", caller, job_id)

        async def body(tx: Transaction) -> Provenance:
            seen = await self._evidence(tx, job_id, version or job.version)
            made = await tx.promotions.attestation(job_id, seen.version)
            if made is not None:
                made = replace(made, index=await tx.outbox.index(made.event_id))
            return Provenance(
                made,
                evaluate(seen),
                await tx.promotions.reports(job_id, seen.version),
                await _placed(tx, await tx.promotions.of_version(job_id, seen.version)),
                await tx.promotions.aliases_of(job_id, seen.version),
                await tx.promotions.tags(job_id, seen.version),
                seen.rollback,
                seen.spending if caller.kind is Kind.OPERATOR else Spending({}, 0, ()),
            )

        # The caller may see the version; the checks look at what it may not, and say no more of it than how they ended.
        return await self._store.run("GetProvenance", None, body)

    async def _evidence(self, tx: Transaction, job_id: UUID, version: int) -> Evidence:
        job = await _job_with(tx, job_id, version)
        plan = await tx.plans.get(job.plan_id)
        assert plan is not None, "a foreign key holds the plan"
        rounds = await tx.rounds.after(job_id, 0, _MOST_ROUNDS)
        reports = await tx.promotions.reports(job_id, version)
        return Evidence(
            job=job,
            version=version,
            plan=plan,
            manifest=read_manifest(plan.manifest),
            rounds=[item for item in rounds if item.round.version <= version],
            metrics=await tx.promotions.measurements(job_id),
            spending=await tx.promotions.spending(job_id),
            findings=[await self._opened(tx, job, report) for report in reports],
            attested=await tx.promotions.attestation(job_id, version) is not None,
            rollback=await tx.promotions.rollback(job_id),
        )

    async def _opened(self, tx: Transaction, job: Job, report: CheckReport) -> Findings:
        """Raises: FedmeshError(STATEMENT_INVALID)."""
        published = await tx.rosters.get(job.roster_sha256)
        if published is None:
            raise FedmeshError(
                Code.STATEMENT_INVALID, "the job began before there were rosters: nobody can sign for it"
            )
        key = published.roster.signing_key(report.hospital_id)
        found = open_findings(report.statement, report.signature, key)
        if (found.hospital_id, found.job_id, found.version) != (report.hospital_id, str(job.job_id), report.version):
            raise FedmeshError(Code.STATEMENT_INVALID, "the report speaks for another hospital, or of another version")
        return found

    async def _move(self, tx: Transaction, caller: Identity, job: Job, moved: Alias) -> None:
        before = await tx.promotions.alias(moved.model, moved.alias)
        await tx.promotions.move_alias(moved)
        facts = {
            "alias": moved.alias,
            "version": moved.version,
            "previous": "" if before is None else f"{before.job_id}/{before.version}",
            "promotion_id": str(moved.promotion_id or ""),
            "model": moved.model,
            # Who may read this entry of the log by itself.
            "hospitals": list(job.hospital_ids),
        }
        telling = event("alias.moved", moved.moved_at, caller, f"job/{moved.job_id}", **facts)
        if moved.promotion_id is not None:
            telling = replace(telling, event_id=move_event_id(moved.promotion_id))
        await tx.outbox.add([telling])

    async def _noting(self, command: Command[T], subject: str, body: Callable[[Transaction], Awaitable[T]]) -> bytes:
        """Run a command; its refusal is told to the audit log."""
        try:
            return await self._mutations.run(command, body)
        except FedmeshError as error:
            if not error.retryable:
                await self._mutations.note_refusal(command, subject, error)
            raise


async def _placed(tx: Transaction, promotions: Sequence[Promotion]) -> tuple[Promotion, ...]:
    """The promotions, with the place of their move in the audit log."""
    return tuple(
        [replace(one, alias_index=await tx.outbox.index(move_event_id(one.promotion_id))) for one in promotions]
    )


def _told(kind: str, promotion: Promotion, caller: Identity, verdict: bytes) -> Event:
    at = promotion.approved_at or promotion.proposed_at
    # Most promotions set nothing aside: their events are as they always were.
    stated = {"reason": promotion.reason} if promotion.reason else {}
    return event(
        kind,
        at,
        caller,
        f"job/{promotion.job_id}",
        promotion_id=str(promotion.promotion_id),
        model=promotion.model,
        alias=promotion.alias,
        version=promotion.version,
        proposed_by=promotion.proposed_by,
        verdict_sha256=hashlib.sha256(verdict).hexdigest(),
        **stated,
    )


async def _job_with(tx: Transaction, job_id: UUID, version: int) -> Job:
    """The job, once it is found to have this version.

    Raises: FedmeshError(NOT_FOUND).
    """
    job = await find_job(tx, job_id)
    if not 1 <= version <= job.version:
        raise FedmeshError(Code.NOT_FOUND, f"job {job_id} has no version {version or 'yet'}")
    return job
