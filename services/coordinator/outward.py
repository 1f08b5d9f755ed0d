"""Registry and aggregator, as the coordinator uses them. Calls may be repeated: request ids follow from the step.

All methods raise FedmeshError as the other side did, or retryable ones while it is away.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.grpc.client import MeshChannel, call
from services.common.ids import derived_id, new_id
from services.coordinator.domain.attempt import Attempt, AttemptId, Contribution
from services.coordinator.domain.events import Event
from services.plans.manifest import PlanManifest, parse_manifest

_PAGE = 500


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


class Registry:
    """timeout_s: deadline of one call."""

    def __init__(self, channel: MeshChannel, timeout_s: float) -> None:
        self._stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
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

    async def job(self, job_id: str) -> Job:
        return _job((await self._call(self._stub.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job)

    async def plan(self, plan_id: str) -> PlanManifest:
        answer = await self._call(self._stub.GetPlan, registry_pb2.GetPlanRequest(plan_id=plan_id))
        return parse_manifest(answer.plan.manifest)

    async def open_attempt(self, job_id: str, round_number: int, after: str, reason: str) -> AttemptId:
        """Number the next attempt. after: names what it follows, so that a repeated call gets the same number."""
        request = registry_pb2.OpenAttemptRequest(
            request_id=derived_id("open-attempt", job_id, round_number, after),
            job_id=job_id,
            round=round_number,
            reason=reason,
        )
        attempt = (await self._call(self._stub.OpenAttempt, request)).attempt
        return AttemptId(attempt.job_id, attempt.round, attempt.attempt)

    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable; known ids are skipped by the registry."""
        request = registry_pb2.RecordEventsRequest(request_id=new_id(), events=[_event(item) for item in events])
        await self._call(self._stub.RecordEvents, request)

    async def commit(self, attempt: Attempt) -> Job:
        request = registry_pb2.CommitRoundRequest(
            request_id=derived_id("commit", *attempt.id), round=_committed_round(attempt)
        )
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
    """timeout_s: deadline of one call."""

    def __init__(self, channel: MeshChannel, timeout_s: float) -> None:
        self._stub = channel.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        self._timeout_s = timeout_s

    async def open(self, attempt: Attempt, manifest: PlanManifest, expires_at: datetime) -> int:
        """Open the attempt's sum; the exact size of an upload in bytes."""
        form = round_pb2.SumForm(
            parameter_set=manifest.encoding.parameter_set,
            lanes=manifest.encoding.lanes,
            vector_length=manifest.vector_length,
        )
        request = aggregator_pb2.OpenSumRequest(
            request_id=derived_id("open-sum", *attempt.id),
            attempt=wire_attempt(attempt.id),
            form=form,
            group=attempt.group,
            expires_at=timestamp(expires_at),
        )
        return int((await call(self._stub.OpenSum, request, timeout_s=self._timeout_s)).upload_bytes)

    async def close(self, attempt: Attempt, minimum: int) -> tuple[tuple[Contribution, ...], str]:
        """Fix the sum; who is in it, and its SHA-256."""
        request = aggregator_pb2.CloseSumRequest(
            request_id=derived_id("close-sum", *attempt.id),
            attempt=wire_attempt(attempt.id),
            minimum_contributors=minimum,
        )
        answer = await call(self._stub.CloseSum, request, timeout_s=self._timeout_s)
        contributions = (Contribution(item.hospital_id, item.ciphertext_sha256) for item in answer.contributions)
        return tuple(sorted(contributions)), answer.sum_sha256

    async def discard(self, attempt: AttemptId) -> None:
        request = aggregator_pb2.DiscardSumRequest(
            request_id=derived_id("discard-sum", *attempt), attempt=wire_attempt(attempt)
        )
        await call(self._stub.DiscardSum, request, timeout_s=self._timeout_s)


def timestamp(at: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(at)
    return message


def timestamp_ms(at_ms: int) -> Timestamp:
    return timestamp(datetime.fromtimestamp(at_ms / 1000, UTC))


def wire_attempt(attempt: AttemptId) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt)


def wire_contributions(attempt: Attempt) -> list[round_pb2.Contribution]:
    return [
        round_pb2.Contribution(hospital_id=item.hospital_id, ciphertext_sha256=item.sha256)
        for item in attempt.contributions
    ]


def _committed_round(attempt: Attempt) -> registry_pb2.CommittedRound:
    return registry_pb2.CommittedRound(
        attempt=wire_attempt(attempt.id),
        version=attempt.round,
        contributions=wire_contributions(attempt),
        sum_sha256=attempt.sum_sha256,
        agreeing=attempt.agreeing,
        dissenting=attempt.dissenting,
        finalizer=attempt.finalizer,
        attesting=attempt.attesting,
        state_sha256=attempt.next_state_sha256,
        metrics_json=attempt.metrics_json,
        sealed_at=timestamp_ms(attempt.sealed_ms),
        upload_bytes=attempt.upload_bytes,
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
