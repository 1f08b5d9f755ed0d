"""A small registry in memory behind the real gRPC server: what coordinator and aggregator use of it, with its rules."""

import hashlib
import random
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import budget_pb2, budget_pb2_grpc
from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1 import registry_pb2_grpc as rpc
from google.protobuf.message import Message

from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.server import Endpoint, MeshServer
from services.plans.manifest import PlanManifest, canonical_bytes, plan_id
from services.secure_sum.opening import check_confirmed
from services.secure_sum.roster import MemberKeys, Roster, found, sign_roster, verify_founding

AnswerT = TypeVar("AnswerT", bound=Message)


class FakeRegistry(rpc.RegistryServiceServicer):
    """`away` makes every call fail as if the service were down; `events` is what was recorded, in order.

    flaky: so many of a hundred changes fail, half of them after they were made. roster: see `found_roster`. epoch: 0
    while none is made. unstored: hospitals whose states never arrive. `standing` has the hospitals that are not active.
    """

    def __init__(self) -> None:
        self.away = False
        self.flaky = 0
        self.chance = random.Random(7)
        self.plans: dict[str, bytes] = {}
        self.jobs: dict[str, pb.Job] = {}
        self.attempts: dict[tuple[str, int], list[str]] = {}
        self.rounds: dict[str, list[pb.CommittedRound]] = {}
        self.standing: dict[str, pb.HospitalStatus.ValueType] = {}
        self.committed_after: list[float] = []
        self.events: dict[str, audit_pb2.Event] = {}
        self.strikes: dict[str, pb.RecordStrikeRequest] = {}
        self.epsilon_left: dict[str, float] = {}
        self.roster: Roster | None = None
        self.rosters: list[pb.Roster] = []
        self.epoch = 1
        self.survivors: dict[tuple[str, int], pb.Survivors] = {}
        self.unstored: set[str] = set()
        self._answers: dict[str, tuple[bytes, Any]] = {}
        self._server: MeshServer | None = None

    # ---- for tests

    async def start(self, tls: TlsConfig) -> str:
        """Serve; the target to call."""
        descriptor = pb.DESCRIPTOR.services_by_name["RegistryService"]
        budgets = budget_pb2.DESCRIPTOR.services_by_name["BudgetService"]
        config = ServerConfig(listen="127.0.0.1:0", tls=tls, drain_s=0)
        endpoints = [
            Endpoint(descriptor, rpc.add_RegistryServiceServicer_to_server, self),
            Endpoint(budgets, budget_pb2_grpc.add_BudgetServiceServicer_to_server, self),
        ]
        self._server = MeshServer(config, endpoints)
        await self._server.start()
        return f"127.0.0.1:{self._server.port}"

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()

    def found_roster(self, consortium: str, keys: Sequence[MemberKeys]) -> Roster:
        """Publish a founding roster of these members."""
        statement = found(consortium, [key.public() for key in keys])
        signatures = {key.hospital_id: sign_roster(statement, key) for key in keys}
        self.roster = verify_founding(statement, signatures)
        signed = [round_pb2.Signature(hospital_id=name, signature=value) for name, value in signatures.items()]
        self.rosters.append(pb.Roster(statement=statement, signatures=signed, sha256=self.roster.sha256))
        return self.roster

    def create_job(self, manifest: PlanManifest, hospital_ids: Sequence[str]) -> str:
        named = plan_id(manifest)
        self.plans[named] = canonical_bytes(manifest)
        job = pb.Job(
            job_id=str(uuid.uuid4()),
            plan_id=named,
            hospital_ids=sorted(hospital_ids),
            status=pb.JOB_STATUS_RUNNING,
            rounds=manifest.rounds.count,
            roster_sha256=self.roster.sha256 if self.roster is not None else "",
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

    async def ListBudgets(self, _request: budget_pb2.ListBudgetsRequest, _context: Any) -> Any:
        self._require_up()
        names = {name for job in self.jobs.values() for name in job.hospital_ids}
        budgets = {name: self.epsilon_left.get(name, 0.25) for name in sorted(names)}
        left = [budget_pb2.HospitalBudget(hospital_id=name, epsilon_left=value) for name, value in budgets.items()]
        return budget_pb2.ListBudgetsResponse(budgets=left, epsilon_limit=0.5)

    async def GetJob(self, request: pb.GetJobRequest, _context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._job(request.job_id))

    async def GetPlan(self, request: pb.GetPlanRequest, _context: Any) -> pb.GetPlanResponse:
        self._require_up()
        plan = pb.Plan(plan_id=request.plan_id, manifest=self.plans[request.plan_id])
        return pb.GetPlanResponse(plan=plan)

    async def ListRosters(self, request: pb.ListRostersRequest, _context: Any) -> pb.ListRostersResponse:
        self._require_up()
        return pb.ListRostersResponse(rosters=self.rosters[request.after_version :])

    async def OpenAttempt(self, request: pb.OpenAttemptRequest, _context: Any) -> pb.OpenAttemptResponse:
        def answer() -> pb.OpenAttemptResponse:
            job = self._running(request.job_id)
            if request.round != job.version + 1:
                raise FedmeshError(Code.WRONG_STATE, f"round must be {job.version + 1}")
            if (request.job_id, request.round) in self.survivors:
                raise FedmeshError(Code.WRONG_STATE, f"round {request.round} has confirmed survivors")
            if self.roster is None or self.epoch == 0:
                raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the job's roster has no key epoch yet")
            reasons = self.attempts.setdefault((request.job_id, request.round), [])
            reasons.append(request.reason)
            return pb.OpenAttemptResponse(
                attempt=round_pb2.Attempt(job_id=request.job_id, round=request.round, attempt=len(reasons)),
                roster_sha256=self.roster.sha256,
                epoch=self.epoch,
            )

        return self._once(request, answer)

    async def StoreSurvivors(self, request: pb.StoreSurvivorsRequest, _context: Any) -> pb.StoreSurvivorsResponse:
        def answer() -> pb.StoreSurvivorsResponse:
            told = request.survivors
            attempt = told.attempt
            job = self._running(attempt.job_id)
            standing = self.survivors.get((attempt.job_id, attempt.round))
            if standing is not None and standing.statement != told.statement:
                raise FedmeshError(Code.WRONG_STATE, "other survivors are stored")
            newest = len(self.attempts[attempt.job_id, attempt.round])
            if attempt.round != job.version + 1 or attempt.attempt != newest:
                raise FedmeshError(Code.WRONG_STATE, "not the newest attempt at the next round")
            assert self.roster is not None
            check_confirmed(
                told.statement, self.roster, {item.hospital_id: item.signature for item in told.confirmations}
            )
            assert len(told.details) <= 4 << 20
            if standing is None:
                self.survivors[attempt.job_id, attempt.round] = told
            return pb.StoreSurvivorsResponse()

        return self._once(request, answer)

    async def GetSurvivors(self, request: pb.GetSurvivorsRequest, _context: Any) -> pb.GetSurvivorsResponse:
        job = self._job(request.job_id)
        return pb.GetSurvivorsResponse(survivors=self.survivors.get((job.job_id, job.version + 1)))

    async def RecordStrike(self, request: pb.RecordStrikeRequest, _context: Any) -> pb.RecordStrikeResponse:
        self._require_up()
        self.strikes.setdefault(request.request_id, request)
        return pb.RecordStrikeResponse(strikes=len(self.strikes))

    async def RecordEvents(self, request: pb.RecordEventsRequest, _context: Any) -> pb.RecordEventsResponse:
        self._require_up()
        for event in request.events:
            uuid.UUID(event.event_id)
            self.events.setdefault(event.event_id, event)
        return pb.RecordEventsResponse()

    async def CommitRound(self, request: pb.CommitRoundRequest, _context: Any) -> pb.CommitRoundResponse:
        def answer() -> pb.CommitRoundResponse:
            committed = request.round
            job = self._running(committed.attempt.job_id)
            newest = len(self.attempts[committed.attempt.job_id, committed.attempt.round])
            if committed.version != job.version + 1 or committed.attempt.attempt != newest:
                raise FedmeshError(Code.WRONG_STATE, "not the next version of the newest attempt")
            self._check_round(job, committed)
            job.version = committed.version
            if not committed.burnt:
                job.state_sha256 = committed.state_sha256
            self.rounds[job.job_id].append(committed)
            sealed = committed.sealed_at.ToDatetime(tzinfo=UTC)
            self.committed_after.append((datetime.now(UTC) - sealed).total_seconds())
            if job.version == job.rounds:
                job.status = pb.JOB_STATUS_COMPLETED
            return pb.CommitRoundResponse(job=job)

        return self._once(request, answer)

    def _check_round(self, job: pb.Job, committed: pb.CommittedRound) -> None:
        stored = self.survivors.get((job.job_id, committed.version))
        if stored is None or hashlib.sha256(stored.statement).hexdigest() != committed.survivors_sha256:
            raise FedmeshError(Code.WRONG_STATE, "these survivors were not stored")
        assert self.roster is not None
        needed = self.roster.threshold
        if committed.burnt:
            if len(committed.contributions) < needed or committed.finalizer or committed.attesting:
                raise FedmeshError(Code.INVALID_ARGUMENT, "not the form of a burnt round")
            if committed.state_sha256 not in ("", job.state_sha256) or not committed.burnt_reason:
                raise FedmeshError(Code.INVALID_ARGUMENT, "a burnt round keeps the state and says why")
            return
        if min(len(committed.contributions), len(committed.agreeing), len(committed.attesting)) < needed:
            raise FedmeshError(Code.INVALID_ARGUMENT, "no quorum")
        if committed.finalizer not in committed.agreeing:
            raise FedmeshError(Code.INVALID_ARGUMENT, "the finalizer does not agree")
        if committed.finalizer in self.unstored:
            raise FedmeshError(Code.WRONG_STATE, "the state was not stored")

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
        roll = self.chance.randrange(100)
        if roll < self.flaky // 2:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the call was lost")
        made = answer()
        kept = type(made)()
        kept.CopyFrom(made)
        self._answers[request.request_id] = (content, kept)
        if roll < self.flaky:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the answer was lost")
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
