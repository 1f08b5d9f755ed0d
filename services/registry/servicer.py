"""The registry's gRPC surface: checks the form of requests, calls a use case, words the answer."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1 import registry_pb2_grpc as rpc

from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.ids import require_name, require_sha256, require_uuid
from services.registry import wire, wire_ledger, wire_sum
from services.registry.domain.entities import (
    Hospital,
    HospitalStatus,
    Job,
    JobStatus,
    KeyEpoch,
    LedgerStanding,
    OpenedAttempt,
    Plan,
    PublishedRoster,
)
from services.registry.usecases.blobs import BlobUseCases
from services.registry.usecases.hospitals import HospitalUseCases, Struck
from services.registry.usecases.jobs import JobUseCases
from services.registry.usecases.ledgers import LedgerUseCases
from services.registry.usecases.membership import MembershipUseCases
from services.registry.usecases.performance import PerformanceUseCases
from services.registry.usecases.plans import PlanUseCases
from services.registry.usecases.ports import Command
from services.registry.usecases.promotions import PromotionUseCases
from services.registry.usecases.rosters import RosterUseCases
from services.registry.usecases.rounds import RoundUseCases
from services.registry.usecases.survivors import SurvivorUseCases


@dataclass(frozen=True)
class UseCases:
    """What the servicer calls, by noun."""

    hospitals: HospitalUseCases
    membership: MembershipUseCases
    rosters: RosterUseCases
    plans: PlanUseCases
    jobs: JobUseCases
    survivors: SurvivorUseCases
    ledgers: LedgerUseCases
    rounds: RoundUseCases
    promotions: PromotionUseCases
    performance: PerformanceUseCases
    blobs: BlobUseCases


class RegistryServicer(rpc.RegistryServiceServicer):
    """Access is decided before: by the policy beside each method and by row-level security behind each query."""

    def __init__(self, usecases: UseCases) -> None:
        self._hospitals = usecases.hospitals
        self._rosters = usecases.rosters
        self._plans = usecases.plans
        self._jobs = usecases.jobs
        self._survivors = usecases.survivors
        self._ledgers = usecases.ledgers
        self._rounds = usecases.rounds
        self._blobs = usecases.blobs

    # --- hospitals

    async def RegisterHospital(self, request: pb.RegisterHospitalRequest, _context: Any) -> pb.RegisterHospitalResponse:
        command: Command[Hospital] = wire.command(
            request, caller(), "RegisterHospital", lambda h: pb.RegisterHospitalResponse(hospital=wire.hospital(h))
        )
        name = require_name(request.hospital_id, "hospital_id")
        display_name = wire.require_text(request.display_name, "display_name", 200)
        return pb.RegisterHospitalResponse.FromString(await self._hospitals.register(command, name, display_name))

    async def SetHospitalStatus(
        self, request: pb.SetHospitalStatusRequest, _context: Any
    ) -> pb.SetHospitalStatusResponse:
        command: Command[Hospital] = wire.command(
            request, caller(), "SetHospitalStatus", lambda h: pb.SetHospitalStatusResponse(hospital=wire.hospital(h))
        )
        name = require_name(request.hospital_id, "hospital_id")
        if wire.require_choice(request.status, wire.HOSPITAL_STATUS, "status") is not HospitalStatus.SUSPENDED:
            raise FedmeshError(
                Code.PERMISSION_DENIED,
                "one person may only suspend: to reinstate or remove a hospital, one proposes and another approves"
                " (`fedmesh members`)",
            )
        reason = wire.require_text(request.reason, "reason", 500)
        return pb.SetHospitalStatusResponse.FromString(await self._hospitals.suspend(command, name, reason))

    async def ListHospitals(self, request: pb.ListHospitalsRequest, _context: Any) -> pb.ListHospitalsResponse:
        found = await self._hospitals.list(caller())
        return pb.ListHospitalsResponse(hospitals=map(wire.hospital, found))

    async def RecordStrike(self, request: pb.RecordStrikeRequest, _context: Any) -> pb.RecordStrikeResponse:
        command: Command[Struck] = wire.command(
            request,
            caller(),
            "RecordStrike",
            lambda s: pb.RecordStrikeResponse(strikes=s.strikes, suspended=s.barred),
        )
        strike = wire_sum.read_strike(request, caller())
        return pb.RecordStrikeResponse.FromString(await self._hospitals.record_strike(command, strike))

    # --- rosters and key epochs

    async def PublishRoster(self, request: pb.PublishRosterRequest, _context: Any) -> pb.PublishRosterResponse:
        command: Command[PublishedRoster] = wire.command(
            request, caller(), "PublishRoster", lambda r: pb.PublishRosterResponse(roster=wire_sum.roster(r))
        )
        signatures = wire_sum.read_signatures(request.signatures, "signatures")
        return pb.PublishRosterResponse.FromString(await self._rosters.publish(command, request.statement, signatures))

    async def ListRosters(self, request: pb.ListRostersRequest, _context: Any) -> pb.ListRostersResponse:
        found = await self._rosters.list(caller(), request.after_version)
        return pb.ListRostersResponse(rosters=wire.fitting([wire_sum.roster(item) for item in found]))

    async def PublishEpoch(self, request: pb.PublishEpochRequest, _context: Any) -> pb.PublishEpochResponse:
        command: Command[KeyEpoch] = wire.command(
            request, caller(), "PublishEpoch", lambda e: pb.PublishEpochResponse(epoch=wire_sum.signed(e.signed))
        )
        signed = wire_sum.read_signed(request.epoch, "epoch")
        return pb.PublishEpochResponse.FromString(await self._rosters.publish_epoch(command, signed))

    async def GetEpoch(self, request: pb.GetEpochRequest, _context: Any) -> pb.GetEpochResponse:
        roster = require_sha256(request.roster_sha256, "roster_sha256") if request.roster_sha256 else ""
        return wire_sum.epoch_standing(await self._rosters.epoch(caller(), roster, request.epoch))

    # --- privacy ledgers

    async def ReportLedger(self, request: pb.ReportLedgerRequest, _context: Any) -> pb.ReportLedgerResponse:
        command: Command[LedgerStanding] = wire.command(request, caller(), "ReportLedger", wire_ledger.standing)
        report = wire_ledger.read_report(request, caller())
        return pb.ReportLedgerResponse.FromString(await self._ledgers.report(command, report))

    async def ListLedgers(self, request: pb.ListLedgersRequest, _context: Any) -> pb.ListLedgersResponse:
        hospital_id = require_name(request.hospital_id, "hospital_id") if request.hospital_id else ""
        size = wire_ledger.require_size(request.page_size)
        return wire_ledger.listed(*await self._ledgers.list(caller(), hospital_id, request.after_seq, size))

    # --- plans

    async def CreatePlan(self, request: pb.CreatePlanRequest, _context: Any) -> pb.CreatePlanResponse:
        command: Command[Plan] = wire.command(
            request, caller(), "CreatePlan", lambda p: pb.CreatePlanResponse(plan=wire.plan(p))
        )
        return pb.CreatePlanResponse.FromString(await self._plans.create(command, request.manifest))

    async def ApprovePlan(self, request: pb.ApprovePlanRequest, _context: Any) -> pb.ApprovePlanResponse:
        command: Command[Plan] = wire.command(
            request, caller(), "ApprovePlan", lambda p: pb.ApprovePlanResponse(plan=wire.plan(p))
        )
        plan_id = require_sha256(request.plan_id, "plan_id")
        return pb.ApprovePlanResponse.FromString(await self._plans.approve(command, plan_id))

    async def GetPlan(self, request: pb.GetPlanRequest, _context: Any) -> pb.GetPlanResponse:
        plan = await self._plans.get(caller(), require_sha256(request.plan_id, "plan_id"))
        return pb.GetPlanResponse(plan=wire.plan(plan))

    async def ListPlans(self, request: pb.ListPlansRequest, _context: Any) -> pb.ListPlansResponse:
        size, before = wire.page_size(request.page_size), wire.read_page_token(request.page_token)
        page = await self._plans.list(caller(), size, before)
        return pb.ListPlansResponse(plans=map(wire.plan, page.items), next_page_token=wire.page_token(page.next_before))

    # --- jobs

    async def CreateJob(self, request: pb.CreateJobRequest, _context: Any) -> pb.CreateJobResponse:
        command: Command[Job] = wire.command(
            request, caller(), "CreateJob", lambda j: pb.CreateJobResponse(job=wire.job(j))
        )
        plan_id = require_sha256(request.plan_id, "plan_id")
        hospitals = [require_name(name, "hospital_ids") for name in request.hospital_ids]
        return pb.CreateJobResponse.FromString(await self._jobs.create(command, plan_id, hospitals))

    async def GetJob(self, request: pb.GetJobRequest, _context: Any) -> pb.GetJobResponse:
        job = await self._jobs.get(caller(), require_uuid(request.job_id, "job_id"))
        return pb.GetJobResponse(job=wire.job(job))

    async def ListJobs(self, request: pb.ListJobsRequest, _context: Any) -> pb.ListJobsResponse:
        choices: dict[Any, JobStatus | None] = {pb.JOB_STATUS_UNSPECIFIED: None, **wire.JOB_STATUS}
        status = wire.require_choice(request.status, choices, "status")
        size, before = wire.page_size(request.page_size), wire.read_page_token(request.page_token)
        page = await self._jobs.list(caller(), status, size, before)
        return pb.ListJobsResponse(jobs=map(wire.job, page.items), next_page_token=wire.page_token(page.next_before))

    async def EndJob(self, request: pb.EndJobRequest, _context: Any) -> pb.EndJobResponse:
        command: Command[Job] = wire.command(request, caller(), "EndJob", lambda j: pb.EndJobResponse(job=wire.job(j)))
        job_id = require_uuid(request.job_id, "job_id")
        status = wire.require_choice(request.status, wire.JOB_STATUS, "status")
        reason = wire.require_text(request.reason, "reason", 500)
        return pb.EndJobResponse.FromString(await self._jobs.end(command, job_id, status, reason))

    # --- blobs

    async def UploadBlob(self, requests: AsyncIterator[pb.UploadBlobRequest], _context: Any) -> pb.UploadBlobResponse:
        try:
            header = wire.read_header(await anext(requests))
        except StopAsyncIteration:
            raise FedmeshError(Code.CHUNK_STREAM_INVALID, "the upload is empty: send its header first") from None
        chunks = (wire.read_chunk(part) async for part in requests)
        return pb.UploadBlobResponse(sha256=await self._blobs.upload(caller(), header, chunks))

    async def DownloadBlob(
        self, request: pb.DownloadBlobRequest, _context: Any
    ) -> AsyncIterator[pb.DownloadBlobResponse]:
        sha256 = require_sha256(request.sha256, "sha256")
        async for chunk in self._blobs.download(caller(), sha256):
            yield pb.DownloadBlobResponse(chunk=chunk)

    # --- rounds

    async def OpenAttempt(self, request: pb.OpenAttemptRequest, _context: Any) -> pb.OpenAttemptResponse:
        command: Command[OpenedAttempt] = wire.command(request, caller(), "OpenAttempt", wire_sum.opened_attempt)
        job_id = require_uuid(request.job_id, "job_id")
        reason = wire.require_text(request.reason, "reason", 500)
        return pb.OpenAttemptResponse.FromString(await self._jobs.open_attempt(command, job_id, request.round, reason))

    async def StoreSurvivors(self, request: pb.StoreSurvivorsRequest, _context: Any) -> pb.StoreSurvivorsResponse:
        command: Command[None] = wire.command(
            request, caller(), "StoreSurvivors", lambda _: pb.StoreSurvivorsResponse()
        )
        told = wire_sum.read_survivors(request.survivors)
        return pb.StoreSurvivorsResponse.FromString(await self._survivors.store(command, told))

    async def GetSurvivors(self, request: pb.GetSurvivorsRequest, _context: Any) -> pb.GetSurvivorsResponse:
        job_id = require_uuid(request.job_id, "job_id")
        return wire_sum.survivors(await self._survivors.get(caller(), job_id))

    async def RecordEvents(self, request: pb.RecordEventsRequest, _context: Any) -> pb.RecordEventsResponse:
        command: Command[None] = wire.command(request, caller(), "RecordEvents", lambda _: pb.RecordEventsResponse())
        events = wire.read_events(request.events, caller())
        return pb.RecordEventsResponse.FromString(await self._rounds.record_events(command, events))

    async def CommitRound(self, request: pb.CommitRoundRequest, _context: Any) -> pb.CommitRoundResponse:
        command: Command[Job] = wire.command(
            request, caller(), "CommitRound", lambda j: pb.CommitRoundResponse(job=wire.job(j))
        )
        return pb.CommitRoundResponse.FromString(await self._rounds.commit(command, wire.read_round(request)))

    async def ListRounds(self, request: pb.ListRoundsRequest, _context: Any) -> pb.ListRoundsResponse:
        job_id, size = require_uuid(request.job_id, "job_id"), wire.page_size(request.page_size)
        rounds = await self._rounds.list(caller(), job_id, request.after_version, size)
        return pb.ListRoundsResponse(rounds=wire.fitting([wire.committed_round(item) for item in rounds]))

    async def GetRoundEntry(self, request: pb.GetRoundEntryRequest, _context: Any) -> pb.GetRoundEntryResponse:
        job_id = require_uuid(request.job_id, "job_id")
        event_id, index = await self._rounds.entry(caller(), job_id, request.version)
        return pb.GetRoundEntryResponse(event_id=str(event_id), index=index)

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, _context: Any) -> pb.GetModelVersionResponse:
        job_id = require_uuid(request.job_id, "job_id")
        version = await self._rounds.model_version(caller(), job_id, request.version)
        return pb.GetModelVersionResponse(model_version=wire.model_version(version))

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, _context: Any
    ) -> pb.ListModelVersionsResponse:
        job_id = require_uuid(request.job_id, "job_id") if request.job_id else None
        size, before = wire.page_size(request.page_size), wire.read_page_token(request.page_token)
        page = await self._rounds.model_versions(caller(), job_id, size, before)
        fitting = wire.fitting([wire.model_version(item) for _, item in page.items])
        after = page.next_before if len(fitting) == len(page.items) else page.items[len(fitting) - 1][0]
        return pb.ListModelVersionsResponse(model_versions=fitting, next_page_token=wire.page_token(after))

    async def ListMetrics(self, request: pb.ListMetricsRequest, _context: Any) -> pb.ListMetricsResponse:
        job_id = require_uuid(request.job_id, "job_id")
        name = wire.require_text(request.name, "name", 63) or None
        found = await self._rounds.metrics(caller(), job_id, name)
        return pb.ListMetricsResponse(metrics=map(wire.metric, found))
