"""Rosters follow one another by the signatures of their members; each has its key epochs."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1
from services.secure_sum.roster import MemberKeys, as_roster, succeed
from tests.integration.registry.harness import (
    HOSPITALS,
    Registry,
    an_epoch,
    code,
    following,
    founding,
    keys,
    publishing,
    refused,
    signed,
)

FOUR = HOSPITALS[:4]


def again(request: pb.PublishRosterRequest) -> pb.PublishRosterRequest:
    """The same under a request id of its own."""
    copied = pb.PublishRosterRequest()
    copied.CopyFrom(request)
    copied.request_id = new_id()
    return copied


async def rosters(registry: Registry) -> Any:
    return (await call(registry.hospital().ListRosters, pb.ListRostersRequest())).rosters


def jobs_begun(registry: Registry, plan_id: str, hospitals: Sequence[str], number: int) -> list[Any]:
    """Calls that create jobs, to be awaited beside something else."""
    return [
        call(
            registry.operator().CreateJob,
            pb.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=hospitals),
            timeout_s=60,
        )
        for _ in range(number)
    ]


async def test_a_founding_roster_is_signed_by_all_and_stands(registry: Registry) -> None:
    await registry.register(*HOSPITALS)
    publish = registry.hospital().PublishRoster
    missing = publishing(founding(*FOUR).statement, *FOUR[1:])
    error = await refused(call(publish, missing))
    assert (error.code, FOUR[0] in error.message) == (Code.STATEMENT_INVALID, True)
    forged = founding(*FOUR)
    forged.signatures[0].signature = forged.signatures[1].signature
    assert await code(call(publish, forged)) is Code.STATEMENT_INVALID
    assert await code(call(publish, founding(*FOUR, consortium="other.test"))) is Code.STATEMENT_INVALID
    twice = founding(*FOUR)
    twice.signatures.append(twice.signatures[0])
    assert await code(call(publish, twice)) is Code.INVALID_ARGUMENT
    assert await code(call(publish, founding(*FOUR, "unknown"))) is Code.NOT_FOUND
    assert await code(call(registry.service().PublishRoster, founding(*FOUR))) is Code.PERMISSION_DENIED
    assert list(await rosters(registry)) == []

    request = founding(*FOUR)
    stored = (await call(publish, request)).roster
    assert as_roster(stored.statement).ids == FOUR
    assert [item.hospital_id for item in stored.signatures] == list(FOUR)
    for harmless in (request, again(request)):
        assert (await call(publish, harmless)).roster == stored
    assert (await call(registry.operator().PublishRoster, again(request))).roster == stored
    fork = await refused(call(publish, founding(*HOSPITALS)))
    assert (fork.code, "another roster of version 1 stands" in fork.message) == (Code.WRONG_STATE, True)
    assert list(await rosters(registry)) == [stored]
    await registry.drained()
    refusals = [item for item in registry.audit.events if item.type == "call.refused"]
    assert [json.loads(item.body_json)["code"] for item in refusals][-1] == "wrong-state"
    told = next(item for item in registry.audit.events if item.type == "roster.published")
    assert json.loads(told.body_json)["statement"].encode() == stored.statement


async def test_a_successor_is_signed_by_the_threshold_of_the_one_before(registry: Registry) -> None:
    present = await registry.found(*FOUR)
    await registry.register(HOSPITALS[4])
    publish = registry.operator().PublishRoster
    few = following(present, *HOSPITALS, signers=FOUR[:2])
    assert await code(call(publish, few)) is Code.STATEMENT_INVALID
    outsider = following(present, *HOSPITALS, signers=(*FOUR[:3], HOSPITALS[4]))
    assert await code(call(publish, outsider)) is Code.STATEMENT_INVALID
    second = as_roster((await call(publish, following(present, *HOSPITALS, signers=FOUR[:3]))).roster.statement)
    fork = following(present, *FOUR[:3], signers=FOUR[:3])
    assert await code(call(publish, fork)) is Code.WRONG_STATE
    found = await rosters(registry)
    assert [item.sha256 for item in found] == [present.sha256, second.sha256]
    newer = await call(registry.service().ListRosters, pb.ListRostersRequest(after_version=1))
    assert [item.sha256 for item in newer.rosters] == [second.sha256]


async def test_a_dropped_member_is_removed_and_the_jobs_whose_keys_it_has_end(registry: Registry) -> None:
    present = await registry.found(*HOSPITALS)
    with_it, without = await registry.job(*HOSPITALS), await registry.job(*FOUR)
    attempt = await registry.open_attempt(with_it.job_id, 1)
    await registry.survive(with_it, 1, attempt)
    await call(registry.hospital().PublishRoster, following(present, *FOUR, signers=FOUR))
    for job in (with_it, without):
        ended = (await call(registry.operator().GetJob, pb.GetJobRequest(job_id=job.job_id))).job
        assert (ended.status, HOSPITALS[4] in ended.reason) == (pb.JOB_STATUS_FAILED, True)
    assert registry.sql("select details from registry.survivors") == [(None,)]
    after = await registry.job(*FOUR)
    assert after.roster_sha256 != present.sha256
    listed = (await call(registry.operator().ListHospitals, pb.ListHospitalsRequest())).hospitals
    assert [item.status for item in listed] == [pb.HOSPITAL_STATUS_ACTIVE] * 4 + [pb.HOSPITAL_STATUS_REMOVED]
    asked = call(registry.hospital(HOSPITALS[4]).ListRosters, pb.ListRostersRequest())
    assert await code(asked) is Code.PERMISSION_DENIED
    await registry.drained()
    assert registry.audit.types().count("job.ended") == 2
    assert registry.audit.types().count("hospital.status_changed") == 1
    newer = as_roster((await rosters(registry))[-1].statement)
    back = following(newer, *HOSPITALS)
    assert await code(call(registry.operator().PublishRoster, back)) is Code.WRONG_STATE


async def test_of_two_rosters_at_once_one_stands_and_no_job_is_forgotten(registry: Registry) -> None:
    present = await registry.found(*HOSPITALS)
    plan_id = await registry.approved_plan()
    publish = registry.operator().PublishRoster
    requests = [following(present, *FOUR), following(present, *HOSPITALS[1:])]
    creating = jobs_begun(registry, plan_id, HOSPITALS, 3)
    outcomes = await asyncio.gather(
        *creating, *(call(publish, each, timeout_s=60) for each in requests), return_exceptions=True
    )
    published = [item for item in outcomes if isinstance(item, pb.PublishRosterResponse)]
    assert len(published) == 1
    assert registry.sql("select count(*) from registry.rosters") == [(2,)]
    # Created before: ended by the roster. Created after: refused, because a member is no longer in it.
    assert registry.sql("select count(*) from registry.jobs where status = 'running'") == [(0,)]


async def test_no_job_that_is_created_beside_a_roster_keeps_the_keys_of_who_is_dropped(registry: Registry) -> None:
    """Its cohort has nobody in common with those who leave."""
    present = await registry.found(*HOSPITALS)
    plan_id = await registry.approved_plan()
    creating = jobs_begun(registry, plan_id, FOUR, 6)
    publishing = call(registry.operator().PublishRoster, following(present, *FOUR), timeout_s=60)
    first, *others = creating
    await asyncio.gather(first, publishing, *others)
    running = registry.sql("select roster_sha256 from registry.jobs where status = 'running'")
    assert (present.sha256,) not in running


async def test_jobs_end_when_a_member_gets_new_keys(registry: Registry) -> None:
    """Whoever has the old ones could open what their epoch's keys protect."""
    present = await registry.found(*HOSPITALS)
    job = await registry.job(*FOUR)
    members = [keys(name).public() for name in HOSPITALS[:4]] + [MemberKeys.generate(HOSPITALS[4]).public()]
    statement = succeed(present, members)
    await call(registry.operator().PublishRoster, publishing(statement, *FOUR))
    ended = (await call(registry.operator().GetJob, pb.GetJobRequest(job_id=job.job_id))).job
    assert (ended.status, HOSPITALS[4] in ended.reason) == (pb.JOB_STATUS_FAILED, True)
    listed = (await call(registry.operator().ListHospitals, pb.ListHospitalsRequest())).hospitals
    assert {item.status for item in listed} == {pb.HOSPITAL_STATUS_ACTIVE}


async def test_a_job_is_bound_to_the_present_roster(registry: Registry) -> None:
    await registry.register(*HOSPITALS)
    plan_id = await registry.approved_plan()

    def creating(*hospitals: str) -> Any:
        request = pb.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=hospitals)
        return call(registry.operator().CreateJob, request)

    error = await refused(creating(*HOSPITALS))
    assert (error.code, "publish the founding one" in error.message) == (Code.WRONG_STATE, True)
    first = await call(registry.operator().PublishRoster, founding(*FOUR))
    assert await code(creating(*HOSPITALS)) is Code.INVALID_ARGUMENT
    job = (await creating(*FOUR[:3])).job
    assert job.roster_sha256 == first.roster.sha256

    opening = pb.OpenAttemptRequest(request_id=new_id(), job_id=job.job_id, round=1)
    early = await refused(call(registry.service().OpenAttempt, opening))
    assert (early.code, early.retryable) == (Code.SERVICE_UNAVAILABLE, True)
    roster = as_roster(first.roster.statement)
    await registry.publish_epoch(an_epoch(roster))
    opened = await call(registry.service().OpenAttempt, opening)
    assert (opened.attempt.attempt, opened.roster_sha256, opened.epoch) == (1, roster.sha256, 1)
    await call(registry.operator().PublishRoster, following(roster, *HOSPITALS))
    opening.request_id = new_id()
    opened = await call(registry.service().OpenAttempt, opening)
    assert (opened.attempt.attempt, opened.roster_sha256, opened.epoch) == (2, roster.sha256, 1)


async def test_a_plan_with_a_public_key_has_the_next_epoch_made_with_one(registry: Registry) -> None:
    await registry.register(*FOUR)
    published = await call(registry.operator().PublishRoster, founding(*FOUR))
    roster = as_roster(published.roster.statement)
    await registry.publish_epoch(an_epoch(roster))

    async def standing() -> tuple[int, bool]:
        answer = await call(registry.hospital().GetEpoch, pb.GetEpochRequest())
        return answer.due, answer.public_key

    assert await standing() == (0, False)
    plan_id = await registry.approved_plan(parameters=BFV_N4096_Q60_T44_PK_V1.name)
    assert await standing() == (2, True)
    (creating,) = jobs_begun(registry, plan_id, FOUR, 1)
    opening = pb.OpenAttemptRequest(request_id=new_id(), job_id=(await creating).job.job_id, round=1)
    early = await refused(call(registry.service().OpenAttempt, opening))
    assert (early.code, "has no public key" in early.message) == (Code.SERVICE_UNAVAILABLE, True)
    old = await refused(registry.publish_epoch(an_epoch(roster, 2)))
    assert (old.code, "needs a public key" in old.message) == (Code.WRONG_STATE, True)
    await registry.publish_epoch(an_epoch(roster, 2, public=True))
    assert await standing() == (0, True)
    assert (await call(registry.service().OpenAttempt, opening)).epoch == 2


async def test_an_epoch_is_due_made_once_and_followed_by_age(registry: Registry) -> None:
    await registry.register(*HOSPITALS)
    hospital = registry.hospital()

    async def ask(**asked: Any) -> pb.GetEpochResponse:
        response: pb.GetEpochResponse = await call(hospital.GetEpoch, pb.GetEpochRequest(**asked))
        return response

    nothing = await ask()
    assert (nothing.due, nothing.roster_sha256, nothing.HasField("epoch")) == (0, "", False)
    published = await call(registry.operator().PublishRoster, founding(*FOUR))
    roster = as_roster(published.roster.statement)
    waiting = await ask()
    assert (waiting.due, waiting.roster_sha256, waiting.HasField("epoch")) == (1, roster.sha256, False)
    assert 0 <= waiting.due_for_s < 60
    assert await code(ask(roster_sha256="a" * 64)) is Code.NOT_FOUND

    first = an_epoch(roster, 1, FOUR[1])
    assert await registry.publish_epoch(first) == signed(first)
    # The first publication stands, whoever comes second with what.
    assert await registry.publish_epoch(an_epoch(roster, 1, FOUR[2], "b3RoZXI=")) == signed(first)
    assert await registry.publish_epoch(first) == signed(first)
    answer = await ask()
    assert (answer.due, answer.due_for_s, answer.epoch) == (0, 0.0, signed(first))
    assert await code(registry.publish_epoch(an_epoch(roster, 2))) is Code.WRONG_STATE
    registry.sql("update registry.epochs set published_at = published_at - interval '25 hours'")
    late = await ask()
    assert (late.due, late.epoch) == (2, signed(first))
    assert timedelta(minutes=59) < timedelta(seconds=late.due_for_s) < timedelta(minutes=70)
    assert await code(registry.publish_epoch(an_epoch(roster, 3))) is Code.WRONG_STATE
    second = an_epoch(roster, 2)
    await registry.publish_epoch(second)
    assert (await ask()).epoch == signed(second)
    assert (await ask(epoch=1, roster_sha256=roster.sha256)).epoch == signed(first)
    assert not (await ask(epoch=9)).HasField("epoch")

    await call(registry.operator().PublishRoster, following(roster, *HOSPITALS))
    fresh = await ask()
    assert (fresh.due, fresh.HasField("epoch")) == (1, False)
    assert (await ask(roster_sha256=roster.sha256)).epoch == signed(second)
    assert await code(registry.publish_epoch(an_epoch(roster, 3))) is Code.WRONG_STATE


async def test_an_epoch_that_is_not_in_order_is_refused(registry: Registry) -> None:
    roster = await registry.found(*FOUR)
    registry.sql("delete from registry.epochs")
    await registry.register(HOSPITALS[4])

    def publishing_epoch(epoch: Any, caller: str = FOUR[0]) -> Any:
        request = pb.PublishEpochRequest(request_id=new_id(), epoch=signed(epoch))
        return call(registry.hospital(caller).PublishEpoch, request)

    good = an_epoch(roster)
    stranger = replace(roster, sha256="a" * 64)
    for epoch, expected in (
        (good._replace(signature=b"\0" * 64), Code.STATEMENT_INVALID),
        (good._replace(statement=good.statement + b" "), Code.STATEMENT_INVALID),
        (an_epoch(stranger), Code.NOT_FOUND),
        (an_epoch(roster, 2), Code.WRONG_STATE),
    ):
        assert await code(publishing_epoch(epoch)) is expected
    assert await code(publishing_epoch(good, FOUR[1])) is Code.PERMISSION_DENIED
    outside = an_epoch(roster, 1, HOSPITALS[4])
    assert await code(publishing_epoch(outside, HOSPITALS[4])) is Code.STATEMENT_INVALID
    assert registry.sql("select 1 from registry.epochs") == []
    assert (await publishing_epoch(good)).epoch == signed(good)


@pytest.mark.parametrize("makers", [FOUR, FOUR[:2]])
async def test_of_epochs_published_at_once_one_stands(registry: Registry, makers: tuple[str, ...]) -> None:
    roster = await registry.found(*FOUR)
    registry.sql("delete from registry.epochs")
    answers = await asyncio.gather(*(registry.publish_epoch(an_epoch(roster, 1, name)) for name in makers * 3))
    assert {item.SerializeToString() for item in answers} == {answers[0].SerializeToString()}
    assert registry.sql("select count(*) from registry.epochs") == [(1,)]
    await registry.drained()
    assert registry.audit.types().count("epoch.published") == 2  # that of `found`, and the one that stands
    assert keys(answers[0].hospital_id).hospital_id in makers
