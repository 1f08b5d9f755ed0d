"""What the registry refuses, with which code, and that nothing has changed then."""

import json
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.plans.manifest import canonical_bytes
from tests.integration.registry.harness import (
    CONSORTIUM,
    HOSPITALS,
    Registry,
    a_round,
    an_event,
    code,
    digest,
    manifest,
    refused,
)

PROPOSED = canonical_bytes(manifest())


def committing(round_message: pb.CommittedRound) -> pb.CommitRoundRequest:
    return pb.CommitRoundRequest(request_id=new_id(), round=round_message)


async def test_callers_keep_to_their_methods(registry: Registry) -> None:
    await registry.register(HOSPITALS[0])
    plan = pb.CreatePlanRequest(request_id=new_id(), manifest=PROPOSED)
    assert await code(call(registry.hospital().CreatePlan, plan)) is Code.PERMISSION_DENIED
    assert await code(call(registry.operator().CommitRound, pb.CommitRoundRequest())) is Code.PERMISSION_DENIED
    assert await code(call(registry.service().CreatePlan, plan)) is Code.PERMISSION_DENIED
    assert await code(call(registry.service("aggregator").OpenAttempt, pb.OpenAttemptRequest())) is (
        Code.PERMISSION_DENIED
    )


async def test_hospitals_are_registered_once_and_removed_for_good(registry: Registry) -> None:
    await registry.register("north")
    operator = registry.operator()

    def registering(name: str, display_name: str = "") -> Any:
        request = pb.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=display_name)
        return call(operator.RegisterHospital, request)

    def setting(name: str, status: Any) -> Any:
        request = pb.SetHospitalStatusRequest(request_id=new_id(), hospital_id=name, status=status, reason="why")
        return call(operator.SetHospitalStatus, request)

    assert await code(registering("north")) is Code.ALREADY_EXISTS
    assert await code(registering("No Name")) is Code.INVALID_ARGUMENT
    assert await code(registering("name\n")) is Code.INVALID_ARGUMENT
    assert await code(registering("south", "a\x00b")) is Code.INVALID_ARGUMENT
    assert await code(registering("south", "x" * 201)) is Code.INVALID_ARGUMENT
    assert await code(setting("unknown", pb.HOSPITAL_STATUS_SUSPENDED)) is Code.NOT_FOUND
    assert await code(setting("north", pb.HOSPITAL_STATUS_UNSPECIFIED)) is Code.INVALID_ARGUMENT
    for status in (pb.HOSPITAL_STATUS_ACTIVE, pb.HOSPITAL_STATUS_REMOVED):
        assert await code(setting("north", status)) is Code.PERMISSION_DENIED, "it takes two people"
    await registry.decide("remove", "north")
    assert await code(setting("north", pb.HOSPITAL_STATUS_SUSPENDED)) is Code.WRONG_STATE
    listed = (await call(operator.ListHospitals, pb.ListHospitalsRequest())).hospitals
    assert [(item.hospital_id, item.status) for item in listed] == [("north", pb.HOSPITAL_STATUS_REMOVED)]


async def test_a_suspended_hospital_is_refused_at_once(registry: Registry) -> None:
    job = await registry.job()
    stub = registry.hospital()
    asked = pb.GetJobRequest(job_id=job.job_id)
    assert (await call(stub.GetJob, asked)).job.job_id == job.job_id

    await registry.suspend(HOSPITALS[0])
    assert await code(call(stub.GetJob, asked)) is Code.PERMISSION_DENIED
    assert await code(call(stub.GetPlan, pb.GetPlanRequest(plan_id=job.plan_id))) is Code.PERMISSION_DENIED
    assert await code(registry.upload(HOSPITALS[0], job.job_id, b"state")) is Code.PERMISSION_DENIED
    assert await code(registry.download(stub, digest(b"state"))) is Code.PERMISSION_DENIED
    another = pb.CreateJobRequest(request_id=new_id(), plan_id=job.plan_id, hospital_ids=HOSPITALS)
    assert await code(call(registry.operator().CreateJob, another)) is Code.WRONG_STATE
    await registry.decide("reinstate", HOSPITALS[0])
    assert (await call(stub.GetJob, asked)).job.job_id == job.job_id
    unregistered = registry.hospital("stranger")
    assert await code(call(unregistered.GetJob, asked)) is Code.PERMISSION_DENIED
    assert await code(call(stub.CreateJob, another)) is Code.PERMISSION_DENIED

    def told_of() -> set[tuple[str, str, str]]:
        told = [(event.subject, json.loads(event.body_json)) for event in events if event.type == "access.refused"]
        return {(subject, body["method"].split("/")[1], body["reason"].split(":")[0]) for subject, body in told}

    events, own = registry.audit.events, f"hospital/{HOSPITALS[0]}"
    suspended = f"hospital {HOSPITALS[0]} is suspended"
    expected = {(own, method, suspended) for method in ("GetJob", "GetPlan", "UploadBlob", "DownloadBlob")}
    expected.add((own, "CreateJob", f"hospital {HOSPITALS[0]} may not call CreateJob"))
    expected.add(("hospital/stranger", "GetJob", "hospital stranger is not registered in this consortium"))

    async def told() -> bool:
        return told_of() == expected

    await registry.settled(told)
    assert {event.actor for event in events if event.type == "access.refused"} == {
        f"spiffe://{CONSORTIUM}/service/registry"
    }


async def test_plans_are_checked_and_approved_by_another(registry: Registry) -> None:
    operator = registry.operator()
    broken = json.loads(PROPOSED)
    broken["colour"] = "red"
    spelled = json.dumps(broken, sort_keys=True, separators=(",", ":")).encode()
    error = await refused(call(operator.CreatePlan, pb.CreatePlanRequest(request_id=new_id(), manifest=spelled)))
    assert error.code is Code.PLAN_INVALID
    assert "colour" in error.message
    loose = pb.CreatePlanRequest(request_id=new_id(), manifest=PROPOSED + b" ")
    assert await code(call(operator.CreatePlan, loose)) is Code.PLAN_INVALID

    plan = (await call(operator.CreatePlan, pb.CreatePlanRequest(request_id=new_id(), manifest=PROPOSED))).plan
    again = (await call(operator.CreatePlan, pb.CreatePlanRequest(request_id=new_id(), manifest=PROPOSED))).plan
    assert again == plan

    def approving(plan_id: str) -> pb.ApprovePlanRequest:
        return pb.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)

    assert await code(call(operator.ApprovePlan, approving(plan.plan_id))) is Code.PERMISSION_DENIED
    assert await code(call(operator.ApprovePlan, approving("0" * 64))) is Code.NOT_FOUND
    await registry.register(*HOSPITALS)
    early = pb.CreateJobRequest(request_id=new_id(), plan_id=plan.plan_id, hospital_ids=HOSPITALS)
    assert await code(call(operator.CreateJob, early)) is Code.WRONG_STATE
    approved = (await call(registry.operator("bob").ApprovePlan, approving(plan.plan_id))).plan
    assert approved.status == pb.PLAN_STATUS_APPROVED
    assert approved.approved_by.endswith("/operator/bob")


@pytest.mark.parametrize(
    ("hospitals", "private", "expected"),
    [
        (HOSPITALS[:1], False, Code.INVALID_ARGUMENT),
        ([HOSPITALS[0], HOSPITALS[0]], False, Code.INVALID_ARGUMENT),
        ([f"h-{number}" for number in range(17)], False, Code.INVALID_ARGUMENT),
        ([HOSPITALS[0], "nobody"], False, Code.NOT_FOUND),
        ([HOSPITALS[0], "No Name"], False, Code.INVALID_ARGUMENT),
        (HOSPITALS[:3], True, Code.PRIVACY_REFUSED),
        (HOSPITALS[:2], False, Code.INVALID_ARGUMENT),
        ([*HOSPITALS[:3], "outside"], False, Code.INVALID_ARGUMENT),
    ],
)
async def test_a_cohort_must_be_fit_for_its_plan(
    registry: Registry, hospitals: list[str], private: bool, expected: Code
) -> None:
    await registry.register(*HOSPITALS, "outside")
    # A roster of three has no room for privacy; one of four asks for three hospitals.
    await registry.found(*HOSPITALS[: 3 if private else 4])
    plan_id = await registry.approved_plan(private)
    request = pb.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=hospitals)
    assert await code(call(registry.operator().CreateJob, request)) is expected
    assert (await call(registry.operator().ListJobs, pb.ListJobsRequest())).jobs == []


async def test_attempts_are_numbered_within_the_next_round_of_a_running_job(registry: Registry) -> None:
    job = await registry.job()
    assert [await registry.open_attempt(job.job_id, 1) for _ in range(3)] == [1, 2, 3]
    assert await code(registry.open_attempt(job.job_id, 2)) is Code.WRONG_STATE
    assert await code(registry.open_attempt(job.job_id, 2**32 - 1)) is Code.WRONG_STATE
    assert await code(registry.open_attempt(new_id(), 1)) is Code.NOT_FOUND
    await registry.commit(job, 1)
    assert await registry.open_attempt(job.job_id, 2) == 1


async def test_a_job_is_failed_by_the_coordinator_and_cancelled_by_an_operator(registry: Registry) -> None:
    job = await registry.job()

    def ending(status: Any, job_id: str = job.job_id) -> pb.EndJobRequest:
        return pb.EndJobRequest(request_id=new_id(), job_id=job_id, status=status, reason="dispute")

    failed, cancelled = ending(pb.JOB_STATUS_FAILED), ending(pb.JOB_STATUS_CANCELLED)
    assert await code(call(registry.operator().EndJob, failed)) is Code.PERMISSION_DENIED
    assert await code(call(registry.service().EndJob, cancelled)) is Code.PERMISSION_DENIED
    assert await code(call(registry.service().EndJob, ending(pb.JOB_STATUS_COMPLETED))) is Code.PERMISSION_DENIED
    assert await code(call(registry.service().EndJob, ending(pb.JOB_STATUS_FAILED, new_id()))) is Code.NOT_FOUND
    ended = (await call(registry.service().EndJob, failed)).job
    assert (ended.status, ended.reason) == (pb.JOB_STATUS_FAILED, "dispute")
    assert ended.HasField("ended_at")
    assert await code(call(registry.operator().EndJob, cancelled)) is Code.WRONG_STATE
    assert await code(registry.open_attempt(job.job_id, 1)) is Code.WRONG_STATE
    assert await code(registry.upload(HOSPITALS[0], job.job_id, b"late")) is Code.WRONG_STATE
    late = committing(a_round(job, 1, 1, digest(b"late")))
    assert await code(call(registry.service().CommitRound, late)) is Code.WRONG_STATE


def _contributions(*names: str) -> list[round_pb2.Contribution]:
    return [round_pb2.Contribution(hospital_id=name, ciphertext_sha256="a" * 64) for name in names]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, Code.INVALID_ARGUMENT),
        ({"contributions": _contributions(*HOSPITALS[:3])}, Code.INVALID_ARGUMENT),
        ({"contributions": _contributions(*HOSPITALS[:4], HOSPITALS[0])}, Code.INVALID_ARGUMENT),
        ({"contributions": _contributions(*HOSPITALS[:4], "stranger")}, Code.INVALID_ARGUMENT),
        ({"agreeing": HOSPITALS[:3]}, Code.INVALID_ARGUMENT),
        ({"agreeing": HOSPITALS[1:]}, Code.INVALID_ARGUMENT),
        ({"dissenting": HOSPITALS[4:]}, Code.INVALID_ARGUMENT),
        ({"attesting": ["stranger"]}, Code.INVALID_ARGUMENT),
        ({"finalizer": ""}, Code.INVALID_ARGUMENT),
        ({"sum_sha256": "A" * 64}, Code.INVALID_ARGUMENT),
        ({"state_sha256": "b" * 64}, Code.WRONG_STATE),
        ({"metrics_json": "[1]"}, Code.INVALID_ARGUMENT),
        ({"metrics_json": '{"auroc":NaN}'}, Code.INVALID_ARGUMENT),
        ({"metrics_json": '{"auroc":{"a":1}}'}, Code.INVALID_ARGUMENT),
        ({"metrics_json": '{"auroc":true}'}, Code.INVALID_ARGUMENT),
        ({"sealed_at": None}, Code.INVALID_ARGUMENT),
        ({"upload_bytes": 2**63}, Code.INVALID_ARGUMENT),
    ],
)
async def test_a_round_that_cannot_be_is_not_committed(
    registry: Registry, changes: dict[str, Any], expected: Code
) -> None:
    job = await registry.job()
    attempt, state = await registry.ready(job)
    request = committing(a_round(job, 1, attempt, state, **changes))
    assert await code(call(registry.service().CommitRound, request)) is expected
    assert (await call(registry.operator().GetJob, pb.GetJobRequest(job_id=job.job_id))).job.version == 0
    assert registry.sql("select 1 from registry.rounds union all select 1 from registry.metrics") == []
    right = committing(a_round(job, 1, attempt, state))
    assert (await call(registry.service().CommitRound, right)).job.version == 1


async def test_only_the_newest_attempt_commits(registry: Registry) -> None:
    job = await registry.job()
    first = await registry.open_attempt(job.job_id, 1)
    second = await registry.open_attempt(job.job_id, 1)
    await registry.survive(job, 1, second)
    state = await registry.upload(HOSPITALS[0], job.job_id, b"state")
    commit = registry.service().CommitRound
    assert await code(call(commit, committing(a_round(job, 1, first, state)))) is Code.WRONG_STATE
    assert await code(call(commit, committing(a_round(job, 1, second + 1, state)))) is Code.WRONG_STATE
    assert await code(call(commit, committing(a_round(job, 2, 1, state)))) is Code.WRONG_STATE
    assert (await call(commit, committing(a_round(job, 1, second, state)))).job.version == 1


async def test_a_state_of_another_job_does_not_count(registry: Registry) -> None:
    job, other = await registry.job(), await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)
    await registry.survive(job, 1, attempt)
    state = await registry.upload(HOSPITALS[0], other.job_id, b"state")
    request = committing(a_round(job, 1, attempt, state))
    assert await code(call(registry.service().CommitRound, request)) is Code.WRONG_STATE


async def test_a_dissenting_minority_is_recorded(registry: Registry) -> None:
    job = await registry.job()
    await registry.commit(job, 1, agreeing=HOSPITALS[:4], dissenting=HOSPITALS[4:], attesting=[])
    kept = (await call(registry.service().ListRounds, pb.ListRoundsRequest(job_id=job.job_id))).rounds[0]
    assert (list(kept.agreeing), list(kept.dissenting), list(kept.attesting)) == (
        list(HOSPITALS[:4]),
        [HOSPITALS[4]],
        [],
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"event_type": "round.committed"}, Code.PERMISSION_DENIED),
        ({"event_type": "plan.approved"}, Code.PERMISSION_DENIED),
        ({"actor": "spiffe://consortium.test/service/aggregator"}, Code.PERMISSION_DENIED),
        ({"actor": "spiffe://consortium.test/service/registry"}, Code.PERMISSION_DENIED),
        ({"actor": "spiffe://consortium.test/operator/alice"}, Code.PERMISSION_DENIED),
        ({"actor": "spiffe://other.test/hospital/north"}, Code.PERMISSION_DENIED),
        ({"body_json": '{"recorded_for":"spiffe://consortium.test/service/audit"}'}, Code.PERMISSION_DENIED),
        ({"actor": "me"}, Code.INVALID_ARGUMENT),
        ({"event_type": "Round Sealed"}, Code.INVALID_ARGUMENT),
        ({"event_id": "one"}, Code.INVALID_ARGUMENT),
        ({"subject": "job"}, Code.INVALID_ARGUMENT),
        ({"occurred_at": None}, Code.INVALID_ARGUMENT),
        ({"body_json": "[]"}, Code.INVALID_ARGUMENT),
        ({"body_json": '{"a":1e999}'}, Code.INVALID_ARGUMENT),
        ({"body_json": '{"a":"' + "x" * 65536 + '"}'}, Code.TOO_LARGE),
    ],
)
async def test_a_forged_or_malformed_event_is_not_recorded(
    registry: Registry, changes: dict[str, Any], expected: Code
) -> None:
    request = pb.RecordEventsRequest(request_id=new_id(), events=[an_event(), an_event(**changes)])
    assert await code(call(registry.service().RecordEvents, request)) is expected
    # But of the refusal itself, which is told in a moment.
    assert registry.sql("select type from registry.outbox where type <> 'access.refused'") == []


async def test_the_number_of_events_is_bounded(registry: Registry) -> None:
    record = registry.service().RecordEvents
    assert await code(call(record, pb.RecordEventsRequest(request_id=new_id()))) is Code.INVALID_ARGUMENT
    many = pb.RecordEventsRequest(request_id=new_id(), events=[an_event() for _ in range(501)])
    assert await code(call(record, many)) is Code.INVALID_ARGUMENT
