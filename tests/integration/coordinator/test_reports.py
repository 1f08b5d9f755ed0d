"""Single calls: who may say what, when, and how often."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as rpc
from fedmesh.registry.v1 import registry_pb2

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.ids import new_id
from services.secure_sum.member import Member
from services.secure_sum.statements import Advert, AttemptRef, Signed, parse, sign
from tests.support.certificates import expired_hospital, foreign_hospital
from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis

SHA256 = hashlib.sha256(b"").hexdigest()


@pytest.fixture
async def mesh(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path, redis_server, hospitals=4, manifest=small_plan(1)) as running:
        yield running


class Caller:
    """One certificate and its channel."""

    def __init__(self, mesh: Mesh, tls: TlsConfig) -> None:
        self._channel = MeshChannel(mesh.coordinators[0].target, tls)
        self.stub = self._channel.stub(rpc.CoordinatorServiceStub)

    async def __aenter__(self) -> "Caller":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def say(self, method: str, request: Any) -> Any:
        return await call(getattr(self.stub, method), request, timeout_s=5)

    async def refused(self, method: str, request: Any) -> Code:
        with pytest.raises(FedmeshError) as caught:
            await self.say(method, request)
        return caught.value.code

    async def first_task(self, cursor: str = "") -> pb.WatchTasksResponse:
        async for response in stream(self.stub.WatchTasks, pb.WatchTasksRequest(cursor=cursor), timeout_s=20):
            if response.HasField("task"):
                return response  # type: ignore[no-any-return]
        raise AssertionError("the stream ended")


def hospital(mesh: Mesh, name: str) -> Caller:
    return Caller(mesh, mesh.ca.issue_hospital(name))


def ready(mesh: Mesh, name: str, task: pb.Task, version: int = 0, **changes: Any) -> pb.ReportReadyRequest:
    """A report with an advert, the same one whenever it is asked for. changes: fields of the attempt."""
    number = (task.attempt.round, task.attempt.attempt)
    simulated = mesh.hospitals[name]
    if number not in simulated.states:
        ref = AttemptRef(job_id=task.attempt.job_id, round=number[0], attempt=number[1])
        member = Member(simulated.keys, mesh.roster)
        simulated.states[number] = member.begin(ref, task.epoch, list(task.cohort))
    attempt = round_pb2.Attempt()
    attempt.CopyFrom(task.attempt)
    for field, value in changes.items():
        setattr(attempt, field, value)
    return pb.ReportReadyRequest(
        request_id=new_id(), attempt=attempt, base_version=version, advert=wire(simulated.states[number].advert)
    )


def wire(signed: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=signed.hospital_id, statement=signed.statement, signature=signed.signature)


def nothing_signed(name: str) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=name, statement=b"{}", signature=bytes(64))


async def test_reports_are_checked(mesh: Mesh) -> None:
    mesh.create_job()
    async with hospital(mesh, "h01") as h01, hospital(mesh, "stranger") as stranger:
        task = (await h01.first_task()).task
        attempt = task.attempt
        report = ready(mesh, "h01", task)
        assert (await h01.say("ReportReady", report)).phase == pb.PHASE_TRAINING
        report.request_id = new_id()
        assert (await h01.say("ReportReady", report)).phase == pb.PHASE_TRAINING
        assert await h01.refused("ReportReady", ready(mesh, "h01", task, version=7)) == Code.WRONG_STATE
        assert await stranger.refused("ReportReady", report) == Code.PERMISSION_DENIED
        assert await h01.refused("ReportReady", ready(mesh, "h01", task, attempt=9)) == Code.WRONG_STATE
        assert await h01.refused("ReportReady", ready(mesh, "h01", task, job_id=new_id())) == Code.WRONG_STATE
        digest = pb.SubmitDigestRequest(
            request_id=new_id(),
            attempt=attempt,
            sum_sha256=SHA256,
            digest=bytes(32),
            next_state_sha256=SHA256,
            signed=nothing_signed("h01"),
        )
        assert await h01.refused("SubmitDigest", digest) == Code.WRONG_STATE
        digest.digest = bytes(31)
        assert await h01.refused("SubmitDigest", digest) == Code.INVALID_ARGUMENT
        state = pb.SubmitStateRequest(request_id=new_id(), attempt=attempt, state_sha256=SHA256)
        assert await h01.refused("SubmitState", state) == Code.WRONG_STATE
        state.metrics_json = '{"loss": NaN}'
        assert await h01.refused("SubmitState", state) == Code.INVALID_ARGUMENT
        shares = pb.SubmitSharesRequest(request_id=new_id(), attempt=attempt, shares=[nothing_signed("h01")])
        assert await h01.refused("SubmitShares", shares) == Code.WRONG_STATE
        shares.shares[0].signature = b"short"
        assert await h01.refused("SubmitShares", shares) == Code.INVALID_ARGUMENT
        confirm = pb.ConfirmSurvivorsRequest(
            request_id=new_id(), attempt=attempt, survivors_sha256=SHA256, signature=bytes(64)
        )
        assert await h01.refused("ConfirmSurvivors", confirm) == Code.WRONG_STATE
        reveal = pb.SubmitRevealRequest(request_id=new_id(), attempt=attempt, reveal=nothing_signed("h01"))
        assert await h01.refused("SubmitReveal", reveal) == Code.WRONG_STATE
        assert not mesh.registry.strikes


async def test_bad_statements_are_strikes_before_anything_is_kept(mesh: Mesh) -> None:
    job_id = mesh.create_job()
    async with hospital(mesh, "h01") as h01, hospital(mesh, "h02") as h02:
        task = (await h01.first_task()).task
        report = ready(mesh, "h01", task)
        signature = report.advert.signature
        report.advert.signature = signature[::-1]
        assert await h01.refused("ReportReady", report) == Code.STATEMENT_INVALID
        # The same call again is the same strike.
        assert await h01.refused("ReportReady", report) == Code.STATEMENT_INVALID
        assert len(mesh.registry.strikes) == 1
        assert mesh.registry.event_types().count("call.refused") == 1
        # A good one is welcome afterwards, but not from another hospital, and no key of it either.
        report.advert.signature = signature
        assert await h02.refused("ReportReady", report) == Code.STATEMENT_INVALID
        await h01.say("ReportReady", report)
        copied = parse(Advert, report.advert.statement).model_copy(update={"hospital_id": "h02"})
        ready(mesh, "h02", task)
        theft = pb.ReportReadyRequest(
            request_id=new_id(), attempt=task.attempt, advert=wire(sign(copied, mesh.hospitals["h02"].keys))
        )
        assert await h02.refused("ReportReady", theft) == Code.STATEMENT_INVALID
        await h02.say("ReportReady", ready(mesh, "h02", task))
        struck = [item.hospital_id for item in mesh.registry.strikes.values()]
        assert struck == ["h01", "h02", "h02"]
        progress = (await mesh.round(job_id)).progress
        assert [item.finished for item in progress][:2] == [pb.PHASE_TRAINING, pb.PHASE_TRAINING]


async def test_only_the_sums_digest_counts_and_nobody_else_finalizes(mesh: Mesh) -> None:
    job_id = mesh.create_job()
    reached: asyncio.Queue[pb.Task] = asyncio.Queue()
    gate = asyncio.Event()

    async def hold(task: pb.Task) -> None:
        if task.kind == pb.TASK_KIND_DECRYPT:
            reached.put_nowait(task)
            await gate.wait()

    for simulated in mesh.hospitals.values():
        simulated.before = hold
    await mesh.start_hospitals()
    task = await reached.get()
    async with hospital(mesh, "h01") as h01:
        digest = pb.SubmitDigestRequest(
            request_id=new_id(),
            attempt=task.attempt,
            sum_sha256=SHA256,
            digest=bytes(32),
            next_state_sha256=SHA256,
            signed=nothing_signed("h01"),
        )
        assert await h01.refused("SubmitDigest", digest) == Code.WRONG_STATE
        state = pb.SubmitStateRequest(request_id=new_id(), attempt=task.attempt, state_sha256=SHA256)
        assert await h01.refused("SubmitState", state) == Code.WRONG_STATE
    gate.set()
    await mesh.ended()
    assert mesh.registry.rounds[job_id][0].finalizer == task.finalizer


async def test_wrong_certificates(mesh: Mesh, tmp_path: Path) -> None:
    job_id = mesh.create_job()
    ca = mesh.ca
    request = pb.GetRoundRequest(job_id=job_id)
    foreign = foreign_hospital(tmp_path / "foreign", "testmesh", "h01", ca.folder / "ca.pem")
    for tls in (foreign, expired_hospital(ca, "h04")):
        try:
            async with Caller(mesh, tls) as caller:
                assert await caller.refused("GetRound", request) == Code.SERVICE_UNAVAILABLE
        except FedmeshError as error:
            # An expired certificate is refused already by its holder.
            assert error.code is Code.CONFIG_INVALID  # noqa: PT017 - one of two places where it may be refused
    async with hospital(mesh, "h01") as h01:
        await h01.first_task()
        assert (await h01.say("GetRound", request)).phase == pb.PHASE_TRAINING
        assert await h01.refused("ListParticipants", pb.ListParticipantsRequest()) == Code.PERMISSION_DENIED
    async with hospital(mesh, "stranger") as stranger:
        assert await stranger.refused("GetRound", request) == Code.NOT_FOUND
    attempt = round_pb2.Attempt(job_id=job_id, round=1, attempt=1)
    report = pb.ReportReadyRequest(request_id=new_id(), attempt=attempt, advert=nothing_signed("h01"))
    for tls in (ca.issue_operator("olga"), ca.issue_service("aggregator")):
        async with Caller(mesh, tls) as caller:
            assert await caller.refused("ReportReady", report) == Code.PERMISSION_DENIED


async def test_a_stream_resumes_by_cursor_and_starts_with_present_tasks(mesh: Mesh) -> None:
    async with hospital(mesh, "h01") as h01:
        first = mesh.create_job()
        task = await h01.first_task()
        assert task.task.attempt.job_id == first
        second = mesh.create_job()
        assert (await h01.first_task(task.cursor)).task.attempt.job_id == second
        seen = set()
        async for response in stream(h01.stub.WatchTasks, pb.WatchTasksRequest(), timeout_s=20):
            if response.HasField("task"):
                seen.add(response.task.attempt.job_id)
            if seen == {first, second}:
                break
        future = "9999999999999-0"
        assert (await h01.first_task(future)).task.attempt.job_id in seen
        with pytest.raises(FedmeshError) as caught:
            await h01.first_task("nonsense")
        assert caught.value.code is Code.INVALID_ARGUMENT


async def test_presence_follows_the_stream(mesh: Mesh) -> None:
    await mesh.start_hospitals(["h01", "h02"])
    present = (await mesh.participants()).participants
    assert [item.hospital_id for item in present] == ["h01", "h02"]
    assert present[0].group_key_fingerprint == "0123456789abcdef"
    assert present[0].connected_at.seconds > 0
    await mesh.hospitals["h01"].stop()
    while [item.hospital_id for item in (await mesh.participants()).participants] != ["h02"]:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.05)


async def test_declined_jobs_go_on_until_too_few_are_left(mesh: Mesh) -> None:
    job_id = mesh.create_job()

    def decline(code: str) -> pb.DeclineJobRequest:
        return pb.DeclineJobRequest(request_id=new_id(), job_id=job_id, code=code, reason="not with our data")

    async with hospital(mesh, "h01") as h01, hospital(mesh, "h02") as h02, hospital(mesh, "stranger") as stranger:
        task = (await h01.first_task()).task
        assert await stranger.refused("DeclineJob", decline("data-invalid")) == Code.PERMISSION_DENIED
        await h01.say("DeclineJob", decline("budget-exhausted"))
        await h01.say("DeclineJob", decline("budget-exhausted"))
        assert await h01.refused("ReportReady", ready(mesh, "h01", task)) == Code.WRONG_STATE
        progress = (await mesh.round(job_id)).progress
        assert [item.declined for item in progress] == [True, False, False, False]
        assert progress[0].decline_reason == "not with our data"
        assert mesh.registry.jobs[job_id].status == registry_pb2.JOB_STATUS_RUNNING
        await h02.say("DeclineJob", decline("data-invalid"))
        while mesh.registry.jobs[job_id].status == registry_pb2.JOB_STATUS_RUNNING:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    reason = mesh.registry.jobs[job_id].reason
    assert "h01: not with our data [budget-exhausted]" in reason
    assert "h02: not with our data [data-invalid]" in reason
    assert mesh.registry.event_types().count("hospital.declined") == 2


async def test_a_job_completes_without_a_hospital_that_declined(mesh: Mesh) -> None:
    job_id = mesh.create_job()
    async with hospital(mesh, "h04") as h04:
        await h04.first_task()
        request = pb.DeclineJobRequest(request_id=new_id(), job_id=job_id, code="data-invalid", reason="no column x")
        await h04.say("DeclineJob", request)
    names = ["h01", "h02", "h03"]
    await mesh.start_hospitals(names)
    await mesh.ended(names)
    assert [item.hospital_id for item in mesh.registry.rounds[job_id][0].contributions] == names


async def test_reports_are_rate_limited(tmp_path: Path, redis_server: RedisServer) -> None:
    limits = {"rate": {"per_second": 0.5, "burst": 3}}
    async with running_mesh(tmp_path, redis_server, coordinator=limits) as mesh:
        mesh.create_job()
        async with hospital(mesh, "h01") as h01, hospital(mesh, "h02") as h02:
            task = (await h01.first_task()).task
            for _ in range(3):
                await h01.say("ReportReady", ready(mesh, "h01", task))
            assert await h01.refused("ReportReady", ready(mesh, "h01", task)) == Code.RATE_LIMITED
            bad = ready(mesh, "h01", task)
            bad.advert.signature = bytes(64)
            assert await h01.refused("ReportReady", bad) == Code.RATE_LIMITED
            assert not mesh.registry.strikes
            await h02.say("ReportReady", ready(mesh, "h02", task))


async def test_a_suspended_hospital_is_not_heard_and_not_waited_for(mesh: Mesh) -> None:
    mesh.registry.standing["h04"] = registry_pb2.HOSPITAL_STATUS_SUSPENDED
    names = ["h01", "h02", "h03"]
    await mesh.start_hospitals(names)
    job_id = mesh.create_job()
    await mesh.ended(names)
    assert [item.hospital_id for item in mesh.registry.rounds[job_id][0].contributions] == names
    attempt = round_pb2.Attempt(job_id=job_id, round=1, attempt=1)
    async with hospital(mesh, "h04") as h04:
        report = pb.ReportReadyRequest(request_id=new_id(), attempt=attempt, advert=nothing_signed("h04"))
        code = None
        async with asyncio.timeout(60):
            # It looks at the list every other second, and the job may have been faster.
            while code != Code.PERMISSION_DENIED:
                code = await h04.refused("ReportReady", report)
                await asyncio.sleep(0.2)
    # The aggregator reads the same list, and both tell the audit log.
    async with MeshChannel(mesh.aggregators[0].target, mesh.ca.issue_hospital("h04")) as channel:
        ask, refused = aggregator_pb2.GetSegmentsRequest(attempt=attempt), ""
        async with asyncio.timeout(60):
            # It looks at the list every other second.
            while "is suspended" not in refused:
                with pytest.raises(FedmeshError) as caught:
                    async for _ in stream(channel.stub(aggregator_pb2_grpc.AggregatorServiceStub).GetSegments, ask):
                        pass
                refused = caught.value.message
                await asyncio.sleep(0.02)
    told: set[tuple[str, str]] = set()
    async with asyncio.timeout(60):
        while not told >= {("coordinator", "hospital/h04"), ("aggregator", "hospital/h04")}:
            await asyncio.sleep(0.02)
            events = [event for event in mesh.registry.events.values() if event.type == "access.refused"]
            told = {(event.actor.rsplit("/", 1)[1], event.subject) for event in events}
    assert all("is suspended" in event.body_json for event in events)
