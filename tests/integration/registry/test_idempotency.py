"""Repeated and concurrent requests: each takes effect once, and all askers get one answer."""

import asyncio
from typing import Any

from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import HOSPITALS, Registry, a_round, an_event, code, digest

TWENTY = range(20)


async def test_a_repeated_request_gets_its_first_answer(registry: Registry) -> None:
    job = await registry.job()
    request = pb.OpenAttemptRequest(request_id=new_id(), job_id=job.job_id, round=1)
    first = await call(registry.service().OpenAttempt, request)
    await registry.open_attempt(job.job_id, 1)
    assert await call(registry.service().OpenAttempt, request) == first
    suspension = pb.SetHospitalStatusRequest(
        request_id=new_id(), hospital_id=HOSPITALS[0], status=pb.HOSPITAL_STATUS_SUSPENDED
    )
    await call(registry.operator().SetHospitalStatus, suspension)
    await registry.decide("reinstate", HOSPITALS[0])
    answer = await call(registry.operator().SetHospitalStatus, suspension)
    assert answer.hospital.status == pb.HOSPITAL_STATUS_SUSPENDED
    now = (await call(registry.operator().ListHospitals, pb.ListHospitalsRequest())).hospitals[0]
    assert now.status == pb.HOSPITAL_STATUS_ACTIVE


async def test_a_request_id_stands_for_one_caller_method_and_content(registry: Registry) -> None:
    job = await registry.job()
    used = new_id()
    await call(registry.service().OpenAttempt, pb.OpenAttemptRequest(request_id=used, job_id=job.job_id, round=1))
    other_content = pb.OpenAttemptRequest(request_id=used, job_id=job.job_id, round=1, reason="another")
    assert await code(call(registry.service().OpenAttempt, other_content)) is Code.REQUEST_ID_REUSED
    other_method = pb.EndJobRequest(request_id=used, job_id=job.job_id, status=pb.JOB_STATUS_FAILED)
    assert await code(call(registry.service().EndJob, other_method)) is Code.REQUEST_ID_REUSED
    events = pb.RecordEventsRequest(
        request_id=new_id(), events=[an_event(actor=f"spiffe://consortium.test/hospital/{HOSPITALS[0]}")]
    )
    await call(registry.service().RecordEvents, events)
    assert await code(call(registry.service("aggregator").RecordEvents, events)) is Code.REQUEST_ID_REUSED
    malformed = pb.EndJobRequest(request_id="1", job_id=job.job_id, status=pb.JOB_STATUS_FAILED)
    assert await code(call(registry.service().EndJob, malformed)) is Code.INVALID_ARGUMENT


async def test_a_job_is_created_once(registry: Registry) -> None:
    job = await registry.job()
    request = pb.CreateJobRequest(request_id=new_id(), plan_id=job.plan_id, hospital_ids=HOSPITALS)
    answers = await asyncio.gather(*(call(registry.operator().CreateJob, request, timeout_s=30) for _ in TWENTY))
    assert {item.job.job_id for item in answers} == {request.request_id}
    assert len((await call(registry.operator().ListJobs, pb.ListJobsRequest())).jobs) == 2


async def test_twenty_commits_of_one_request_make_one_version(registry: Registry) -> None:
    job = await registry.job()
    attempt, state = await registry.ready(job)
    request = pb.CommitRoundRequest(request_id=new_id(), round=a_round(job, 1, attempt, state))
    answers = await asyncio.gather(*(call(registry.service().CommitRound, request, timeout_s=30) for _ in TWENTY))
    assert {item.SerializeToString(deterministic=True) for item in answers} == {
        answers[0].SerializeToString(deterministic=True)
    }
    assert _count(registry, "rounds") == 1
    of_the_joint_model = registry.sql("select count(*) from registry.measurements where hospital_id = ''")
    assert of_the_joint_model == [(2,)]
    await registry.drained()
    assert registry.audit.types().count("round.committed") == 1


async def test_the_same_round_under_twenty_request_ids_makes_one_version(registry: Registry) -> None:
    job = await registry.job()
    attempt, state = await registry.ready(job)
    told = a_round(job, 1, attempt, state)
    requests = [pb.CommitRoundRequest(request_id=new_id(), round=told) for _ in TWENTY]
    answers = await asyncio.gather(*(call(registry.service().CommitRound, each, timeout_s=30) for each in requests))
    assert {(item.job.version, item.job.state_sha256) for item in answers} == {(1, state)}
    assert _count(registry, "rounds") == 1
    await registry.drained()
    assert registry.audit.types().count("round.committed") == 1


async def test_of_twenty_different_rounds_one_wins(registry: Registry) -> None:
    job = await registry.job()
    attempt, state = await registry.ready(job)

    async def commit(number: int) -> str:
        told = a_round(job, 1, attempt, state, sum_sha256=digest(bytes([number])))
        request = pb.CommitRoundRequest(request_id=new_id(), round=told)
        try:
            return str((await call(registry.service().CommitRound, request, timeout_s=30)).job.version)
        except FedmeshError as error:
            return error.code.value

    results = await asyncio.gather(*(commit(number) for number in TWENTY))
    assert sorted(results) == ["1"] + [Code.WRONG_STATE.value] * 19
    assert _count(registry, "rounds") == 1


async def test_concurrent_attempts_get_distinct_numbers(registry: Registry) -> None:
    job = await registry.job()
    numbers = await asyncio.gather(*(_patient(registry, job.job_id) for _ in TWENTY))
    assert sorted(numbers) == list(range(1, 21))


async def test_one_upload_by_many_is_stored_once(registry: Registry) -> None:
    job = await registry.job()
    content = b"z" * (3 << 19)
    done = await asyncio.gather(*(registry.upload(name, job.job_id, content) for name in HOSPITALS[:4]))
    assert set(done) == {digest(content)}
    assert _count(registry, "blob_chunks") == 2
    await registry.drained()
    assert registry.audit.types().count("blob.stored") == 1


async def test_known_events_are_skipped(registry: Registry) -> None:
    old, new = an_event(), an_event()
    await call(registry.service().RecordEvents, pb.RecordEventsRequest(request_id=new_id(), events=[old, old]))
    await call(registry.service().RecordEvents, pb.RecordEventsRequest(request_id=new_id(), events=[old, new]))
    await registry.drained()
    assert [item.event_id for item in registry.audit.events] == [old.event_id, new.event_id]


def _count(registry: Registry, table: str) -> Any:
    return registry.sql(f"select count(*) from registry.{table}")[0][0]


async def _patient(registry: Registry, job_id: str) -> int:
    request = pb.OpenAttemptRequest(request_id=new_id(), job_id=job_id, round=1)
    response = await call(registry.service().OpenAttempt, request, timeout_s=30, patience_s=30)
    return int(response.attempt.attempt)
