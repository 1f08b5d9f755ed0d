"""A small registry in memory behind the real gRPC server: what coordinator and aggregator use of it, with its rules."""

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1 import registry_pb2_grpc as rpc
from google.protobuf.message import Message

from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.server import Endpoint, MeshServer
from services.plans.manifest import PlanManifest, canonical_bytes, plan_id
from services.secure_sum.cohort import threshold

AnswerT = TypeVar("AnswerT", bound=Message)


class FakeRegistry(rpc.RegistryServiceServicer):
    """`away` makes every call fail as if the service were down; `events` is what was recorded, in order.

    `standing` has the hospitals that are not active.
    """

    def __init__(self) -> None:
        self.away = False
        self.plans: dict[str, bytes] = {}
        self.jobs: dict[str, pb.Job] = {}
        self.attempts: dict[tuple[str, int], list[str]] = {}
        self.rounds: dict[str, list[pb.CommittedRound]] = {}
        self.standing: dict[str, pb.HospitalStatus.ValueType] = {}
        self.committed_after: list[float] = []
        self.events: dict[str, audit_pb2.Event] = {}
        self.strikes: dict[str, pb.RecordStrikeRequest] = {}
        self._answers: dict[str, tuple[bytes, Any]] = {}
        self._server: MeshServer | None = None

    # ---- for tests

    async def start(self, tls: TlsConfig) -> str:
        """Serve; the target to call."""
        descriptor = pb.DESCRIPTOR.services_by_name["RegistryService"]
        config = ServerConfig(listen="127.0.0.1:0", tls=tls, drain_s=0)
        self._server = MeshServer(config, [Endpoint(descriptor, rpc.add_RegistryServiceServicer_to_server, self)])
        await self._server.start()
        return f"127.0.0.1:{self._server.port}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()

    def create_job(self, manifest: PlanManifest, hospital_ids: Sequence[str]) -> str:
        named = plan_id(manifest)
        self.plans[named] = canonical_bytes(manifest)
        job = pb.Job(
            job_id=str(uuid.uuid4()),
            plan_id=named,
            hospital_ids=sorted(hospital_ids),
            status=pb.JOB_STATUS_RUNNING,
            rounds=manifest.rounds.count,
        )
        self.jobs[job.job_id] = job
        self.rounds[job.job_id] = []
        return job.job_id

    def cancel(self, job_id: str, reason: str) -> None:
        job = self.jobs[job_id]
        job.status, job.reason = pb.JOB_STATUS_CANCELLED, reason

    def event_types(self) -> list[str]:
        return [event.type for event in self.events.values()]

    # ---- the service

    async def ListJobs(self, request: pb.ListJobsRequest, _context: Any) -> pb.ListJobsResponse:
        self._require_up()
        return pb.ListJobsResponse(jobs=[job for job in self.jobs.values() if request.status in (0, job.status)])

    async def ListHospitals(self, _request: pb.ListHospitalsRequest, _context: Any) -> pb.ListHospitalsResponse:
        self._require_up()
        names = {name for job in self.jobs.values() for name in job.hospital_ids} | set(self.standing)
        return pb.ListHospitalsResponse(
            hospitals=[
                pb.Hospital(hospital_id=name, status=self.standing.get(name, pb.HOSPITAL_STATUS_ACTIVE))
                for name in sorted(names)
            ]
        )

    async def GetJob(self, request: pb.GetJobRequest, _context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._job(request.job_id))

    async def GetPlan(self, request: pb.GetPlanRequest, _context: Any) -> pb.GetPlanResponse:
        self._require_up()
        plan = pb.Plan(plan_id=request.plan_id, manifest=self.plans[request.plan_id])
        return pb.GetPlanResponse(plan=plan)

    async def OpenAttempt(self, request: pb.OpenAttemptRequest, _context: Any) -> pb.OpenAttemptResponse:
        def answer() -> pb.OpenAttemptResponse:
            job = self._running(request.job_id)
            if request.round != job.version + 1:
                raise FedmeshError(Code.WRONG_STATE, f"round must be {job.version + 1}")
            reasons = self.attempts.setdefault((request.job_id, request.round), [])
            reasons.append(request.reason)
            return pb.OpenAttemptResponse(
                attempt=round_pb2.Attempt(job_id=request.job_id, round=request.round, attempt=len(reasons))
            )

        return self._once(request, answer)

    async def RecordEvents(self, request: pb.RecordEventsRequest, _context: Any) -> pb.RecordEventsResponse:
        self._require_up()
        for event in request.events:
            uuid.UUID(event.event_id)
            self.events.setdefault(event.event_id, event)
        return pb.RecordEventsResponse()

    async def RecordStrike(self, request: pb.RecordStrikeRequest, _context: Any) -> pb.RecordStrikeResponse:
        self._require_up()
        self.strikes.setdefault(request.request_id, request)
        return pb.RecordStrikeResponse(strikes=len(self.strikes))

    async def CommitRound(self, request: pb.CommitRoundRequest, _context: Any) -> pb.CommitRoundResponse:
        def answer() -> pb.CommitRoundResponse:
            committed = request.round
            job = self._running(committed.attempt.job_id)
            newest = len(self.attempts[committed.attempt.job_id, committed.attempt.round])
            needed = threshold(len(job.hospital_ids))
            if committed.version != job.version + 1 or committed.attempt.attempt != newest:
                raise FedmeshError(Code.WRONG_STATE, "not the next version of the newest attempt")
            if min(len(committed.contributions), len(committed.agreeing), len(committed.attesting)) < needed:
                raise FedmeshError(Code.INVALID_ARGUMENT, "no quorum")
            job.version, job.state_sha256 = committed.version, committed.state_sha256
            self.rounds[job.job_id].append(committed)
            sealed = committed.sealed_at.ToDatetime(tzinfo=UTC)
            self.committed_after.append((datetime.now(UTC) - sealed).total_seconds())
            if job.version == job.rounds:
                job.status = pb.JOB_STATUS_COMPLETED
            return pb.CommitRoundResponse(job=job)

        return self._once(request, answer)

    async def EndJob(self, request: pb.EndJobRequest, _context: Any) -> pb.EndJobResponse:
        def answer() -> pb.EndJobResponse:
            job = self._running(request.job_id)
            job.status, job.reason = request.status, request.reason
            return pb.EndJobResponse(job=job)

        return self._once(request, answer)

    def _once(self, request: Any, answer: Callable[[], AnswerT]) -> AnswerT:
        self._require_up()
        content = request.SerializeToString(deterministic=True)
        before = self._answers.get(request.request_id)
        if before is not None:
            if before[0] != content:
                raise FedmeshError(Code.REQUEST_ID_REUSED, "another request had this id")
            return cast(AnswerT, before[1])
        made = answer()
        kept = type(made)()
        kept.CopyFrom(made)
        self._answers[request.request_id] = (content, kept)
        return kept

    def _require_up(self) -> None:
        if self.away:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the registry is away")

    def _job(self, job_id: str) -> pb.Job:
        self._require_up()
        if job_id not in self.jobs:
            raise FedmeshError(Code.NOT_FOUND, "there is no such job")
        return self.jobs[job_id]

    def _running(self, job_id: str) -> pb.Job:
        job = self._job(job_id)
        if job.status != pb.JOB_STATUS_RUNNING:
            raise FedmeshError(Code.WRONG_STATE, "the job has ended")
        return job
