"""Registry and aggregator, as the coordinator uses them. Calls may be repeated: request ids follow from the step.

All methods raise FedmeshError as the other side did, or retryable ones while it is away.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import budget_pb2, budget_pb2_grpc, registry_pb2, registry_pb2_grpc

from services.common.errors import FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import derived_id, new_id
from services.coordinator.domain.attempt import Attempt, AttemptId, Counted
from services.coordinator.domain.events import Event
from services.coordinator.rosters import SignedRoster
from services.coordinator.wire import (
    parse_signatures,
    timestamp,
    timestamp_ms,
    wire_attempt,
    wire_contributions,
    wire_opening,
    wire_signatures,
)
from services.plans.manifest import PlanManifest, parse_manifest
from services.secure_sum.opening import MaskKey, Opening
from services.secure_sum.roster import Roster

_PAGE = 500
_COMPUTE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Job:
    """A job as the registry has it. `version` is the newest committed one; `reason` says why it ended."""

    job_id: str
    plan_id: str
    hospital_ids: tuple[str, ...]
    running: bool
    status: str
    reason: str
    version: int
    state_sha256: str


class OpenedAttempt(NamedTuple):
    """A numbered attempt, and the roster and key epoch that it is bound to."""

    id: AttemptId
    roster_sha256: str
    epoch: int


class StoredSurvivors(NamedTuple):
    """Confirmed survivors as the registry has them; `details` is what `rebuild` wrote."""

    attempt: AttemptId
    statement: bytes
    confirmations: Mapping[str, bytes]
    details: bytes


class Registry:
    """timeout_s: deadline of one call."""

    def __init__(self, channel: MeshChannel, timeout_s: float) -> None:
        self._stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
        self._budgets = channel.stub(budget_pb2_grpc.BudgetServiceStub)
        self._timeout_s = timeout_s

    async def _call(self, method: Any, request: Any) -> Any:
        return await call(method, request, timeout_s=self._timeout_s)

    async def running_jobs(self) -> list[Job]:
        jobs: list[Job] = []
        token = ""
        while True:
            request = registry_pb2.ListJobsRequest(
                status=registry_pb2.JOB_STATUS_RUNNING, page_size=_PAGE, page_token=token
            )
            answer = await self._call(self._stub.ListJobs, request)
            jobs += map(_job, answer.jobs)
            token = answer.next_page_token
            if not token:
                return jobs

    async def budgets(self) -> budget_pb2.ListBudgetsResponse:
        """What hospitals have left, as far as reported."""
        answer: budget_pb2.ListBudgetsResponse = await self._call(
            self._budgets.ListBudgets, budget_pb2.ListBudgetsRequest()
        )
        return answer

    async def job(self, job_id: str) -> Job:
        return _job((await self._call(self._stub.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job)

    async def plan(self, plan_id: str) -> PlanManifest:
        answer = await self._call(self._stub.GetPlan, registry_pb2.GetPlanRequest(plan_id=plan_id))
        return parse_manifest(answer.plan.manifest)

    async def open_attempt(self, job_id: str, round_number: int, after: str, reason: str) -> OpenedAttempt:
        """Number the next attempt. after: names what it follows, so that a repeated call gets the same number."""
        request = registry_pb2.OpenAttemptRequest(
            request_id=derived_id("open-attempt", job_id, round_number, after),
            job_id=job_id,
            round=round_number,
            reason=reason,
        )
        answer = await self._call(self._stub.OpenAttempt, request)
        return OpenedAttempt(_attempt_id(answer.attempt), answer.roster_sha256, answer.epoch)

    async def rosters(self, after_version: int) -> list[SignedRoster]:
        request = registry_pb2.ListRostersRequest(after_version=after_version)
        answer = await self._call(self._stub.ListRosters, request)
        return [SignedRoster(item.statement, parse_signatures(item.signatures)) for item in answer.rosters]

    async def survivors(self, job_id: str) -> StoredSurvivors | None:
        """The survivors of the job's open round, which must be completed or burnt."""
        request = registry_pb2.GetSurvivorsRequest(job_id=job_id)
        answer = await self._call(self._stub.GetSurvivors, request)
        if not answer.HasField("survivors"):
            return None
        found = answer.survivors
        return StoredSurvivors(
            _attempt_id(found.attempt), found.statement, parse_signatures(found.confirmations), found.details
        )

    async def store_survivors(self, attempt: Attempt, confirmations: Mapping[str, bytes], details: bytes) -> None:
        """Make the list durable. The same list with other signatures is another request, and as welcome."""
        survivors = registry_pb2.Survivors(
            attempt=wire_attempt(attempt.id),
            statement=attempt.survivors.encode(),
            confirmations=wire_signatures(confirmations),
            details=details,
        )
        content = hashlib.sha256(survivors.SerializeToString(deterministic=True)).hexdigest()
        request = registry_pb2.StoreSurvivorsRequest(
            request_id=derived_id("store-survivors", *attempt.id, content), survivors=survivors
        )
        await self._call(self._stub.StoreSurvivors, request)

    async def strike(self, attempt: AttemptId, hospital_id: str, error: FedmeshError, what: str) -> None:
        """Note that a hospital sent something that no honest node sends. what: names the deed within the attempt."""
        request = registry_pb2.RecordStrikeRequest(
            request_id=derived_id("strike", *attempt, hospital_id, what, error.code.value),
            hospital_id=hospital_id,
            code=error.code.value,
            reason=error.message[:500],
            attempt=wire_attempt(attempt),
        )
        await self._call(self._stub.RecordStrike, request)

    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable; known ids are skipped by the registry."""
        request = registry_pb2.RecordEventsRequest(request_id=new_id(), events=[_event(item) for item in events])
        await self._call(self._stub.RecordEvents, request)

    async def commit(self, attempt: Attempt) -> Job:
        request = registry_pb2.CommitRoundRequest(
            request_id=derived_id("commit", *attempt.id), round=_committed_round(attempt)
        )
        return _job((await self._call(self._stub.CommitRound, request)).job)

    async def burn(self, attempt: Attempt, reason: str) -> Job:
        """Use the version up: it has the state of the one before."""
        burnt = registry_pb2.CommittedRound(
            attempt=wire_attempt(attempt.id),
            version=attempt.round,
            contributions=wire_contributions(attempt),
            sum_sha256=attempt.sum_sha256,
            state_sha256=attempt.base_state_sha256,
            sealed_at=timestamp_ms(attempt.sealed_ms),
            upload_bytes=attempt.upload_bytes,
            burnt=True,
            burnt_reason=reason,
            survivors_sha256=attempt.survivors_sha256,
        )
        content = hashlib.sha256(burnt.SerializeToString(deterministic=True)).hexdigest()
        request = registry_pb2.CommitRoundRequest(request_id=derived_id("burn", *attempt.id, content), round=burnt)
        return _job((await self._call(self._stub.CommitRound, request)).job)

    async def fail_job(self, job_id: str, reason: str) -> Job:
        request = registry_pb2.EndJobRequest(
            request_id=derived_id("end-job", job_id, reason),
            job_id=job_id,
            status=registry_pb2.JOB_STATUS_FAILED,
            reason=reason,
        )
        return _job((await self._call(self._stub.EndJob, request)).job)


class Aggregator:
    """timeout_s: deadline of one call. Computing a sum takes seconds when the model is large: it may take longer."""

    def __init__(self, channel: MeshChannel, timeout_s: float) -> None:
        self._stub = channel.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        self._timeout_s = timeout_s
        self._compute_timeout_s = max(_COMPUTE_TIMEOUT_S, timeout_s)

    async def open(self, attempt: Attempt, manifest: PlanManifest, roster: Roster, expires_at: datetime) -> int:
        """Open the attempt's sum for the sharers; the exact size of an upload in bytes."""
        form = round_pb2.SumForm(
            parameter_set=manifest.encoding.parameter_set,
            lanes=manifest.encoding.lanes,
            vector_length=manifest.vector_length,
        )
        signers = [
            aggregator_pb2.SignerKey(hospital_id=name, signing_key=roster.signing_key(name)) for name in attempt.sharers
        ]
        request = aggregator_pb2.OpenSumRequest(
            request_id=derived_id("open-sum", *attempt.id),
            attempt=wire_attempt(attempt.id),
            form=form,
            group=attempt.sharers,
            expires_at=timestamp(expires_at),
            signers=signers,
            adverts_sha256=attempt.adverts_sha256,
        )
        return int((await call(self._stub.OpenSum, request, timeout_s=self._timeout_s)).upload_bytes)

    async def close(self, attempt: AttemptId, minimum: int) -> tuple[Counted, ...]:
        """End the uploads; who was counted."""
        request = aggregator_pb2.CloseSumRequest(
            request_id=derived_id("close-sum", *attempt),
            attempt=wire_attempt(attempt),
            minimum_contributors=minimum,
        )
        return _counted(await call(self._stub.CloseSum, request, timeout_s=self._timeout_s))

    async def closed(self, attempt: AttemptId) -> tuple[Counted, ...]:
        """Who was counted, once the uploads are closed; nobody before."""
        request = aggregator_pb2.GetSumRequest(attempt=wire_attempt(attempt))
        answer = await call(self._stub.GetSum, request, timeout_s=self._timeout_s)
        return () if answer.state == aggregator_pb2.SUM_STATE_OPEN else _counted(answer)

    async def compute(self, attempt: Attempt, keys: Sequence[MaskKey], opening: Opening) -> str:
        """Add the survivors' uploads and take their masks off; SHA-256 of the sum."""
        request = aggregator_pb2.ComputeSumRequest(
            request_id=derived_id("compute-sum", *attempt.id),
            attempt=wire_attempt(attempt.id),
            survivors=attempt.survivor_ids,
            mask_keys=[
                aggregator_pb2.MaskKey(
                    hospital_id=key.hospital_id,
                    position=key.position,
                    mask_key=key.mask_key,
                    seed_commitment=key.seed_commitment,
                )
                for key in keys
            ],
            opening=wire_opening(opening),
        )
        answer = await call(self._stub.ComputeSum, request, timeout_s=self._compute_timeout_s)
        return str(answer.sum_sha256)

    async def discard(self, attempt: AttemptId) -> None:
        request = aggregator_pb2.DiscardSumRequest(
            request_id=derived_id("discard-sum", *attempt), attempt=wire_attempt(attempt)
        )
        await call(self._stub.DiscardSum, request, timeout_s=self._timeout_s)


def _attempt_id(message: round_pb2.Attempt) -> AttemptId:
    return AttemptId(message.job_id, message.round, message.attempt)


def _counted(answer: Any) -> tuple[Counted, ...]:
    return tuple(
        sorted(Counted(item.hospital_id, item.ciphertext_sha256, item.upload_sha256) for item in answer.contributions)
    )


def _committed_round(attempt: Attempt) -> registry_pb2.CommittedRound:
    return registry_pb2.CommittedRound(
        attempt=wire_attempt(attempt.id),
        version=attempt.round,
        contributions=wire_contributions(attempt),
        sum_sha256=attempt.sum_sha256,
        agreeing=attempt.agreement.agreeing,
        dissenting=attempt.agreement.dissenting,
        finalizer=attempt.finalizer,
        attesting=attempt.attesting,
        state_sha256=attempt.next_state_sha256,
        metrics_json=attempt.metrics_json,
        sealed_at=timestamp_ms(attempt.sealed_ms),
        upload_bytes=attempt.upload_bytes,
        survivors_sha256=attempt.survivors_sha256,
    )


def _job(message: registry_pb2.Job) -> Job:
    return Job(
        job_id=message.job_id,
        plan_id=message.plan_id,
        hospital_ids=tuple(sorted(message.hospital_ids)),
        running=message.status == registry_pb2.JOB_STATUS_RUNNING,
        status=registry_pb2.JobStatus.Name(message.status).removeprefix("JOB_STATUS_").lower(),
        reason=message.reason,
        version=message.version,
        state_sha256=message.state_sha256,
    )


def _event(event: Event) -> audit_pb2.Event:
    return audit_pb2.Event(
        event_id=event.event_id,
        type=event.type,
        occurred_at=timestamp(event.occurred_at),
        actor=event.actor,
        subject=event.subject,
        body_json=event.body_json,
    )
