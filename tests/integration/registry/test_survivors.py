"""Confirmed survivors: one list for a round, and only it makes or burns the version."""

import asyncio
import json
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import (
    HOSPITALS,
    Registry,
    a_round,
    burning,
    code,
    digest,
    refused,
    storing,
    survivors,
)

FOUR = HOSPITALS[:4]


def committing(told: pb.CommittedRound) -> pb.CommitRoundRequest:
    return pb.CommitRoundRequest(request_id=new_id(), round=told)


async def stored(registry: Registry, job: pb.Job) -> pb.GetSurvivorsResponse:
    response: pb.GetSurvivorsResponse = await call(
        registry.service().GetSurvivors, pb.GetSurvivorsRequest(job_id=job.job_id)
    )
    return response


async def test_the_first_list_stands_and_no_other_attempt_opens(registry: Registry) -> None:
    job = await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)
    assert not (await stored(registry, job)).HasField("survivors")
    store = registry.service().StoreSurvivors
    large = b"x" * (4 << 20)
    request = storing(job, 1, attempt, details=large)
    await call(store, request)
    request.request_id = new_id()
    await call(store, request)
    kept = (await stored(registry, job)).survivors
    assert (kept.statement, kept.details) == (survivors(job, 1, attempt), large)
    assert list(kept.confirmations) == list(request.survivors.confirmations)
    assert kept.stored_at.seconds > 0
    another = storing(job, 1, attempt, survivors(job, 1, attempt, FOUR), FOUR)
    assert await code(call(store, another)) is Code.WRONG_STATE
    error = await refused(registry.open_attempt(job.job_id, 1))
    assert (error.code, "burnt" in error.message) == (Code.WRONG_STATE, True)

    state = await registry.upload(HOSPITALS[0], job.job_id, b"state")
    await call(registry.service().CommitRound, committing(a_round(job, 1, attempt, state)))
    assert not (await stored(registry, job)).HasField("survivors")
    assert registry.sql("select round, details from registry.survivors") == [(1, None)]
    await call(store, request)  # still the same, still harmless
    assert await registry.open_attempt(job.job_id, 2) == 1
    await registry.drained()
    assert registry.audit.types().count("survivors.stored") == 1
    refusals = [item for item in registry.audit.events if item.type == "call.refused"]
    assert [json.loads(item.body_json)["method"] for item in refusals] == ["StoreSurvivors"]


async def test_a_list_that_is_not_in_order_is_not_stored(registry: Registry) -> None:
    job = await registry.job()
    first = await registry.open_attempt(job.job_id, 1)
    attempt = await registry.open_attempt(job.job_id, 1)
    other = await registry.job()
    await registry.open_attempt(other.job_id, 1)
    forged = storing(job, 1, attempt)
    forged.survivors.confirmations[0].signature = b"\0" * 64
    store = registry.service().StoreSurvivors
    small = await registry.job(*FOUR)
    await registry.open_attempt(small.job_id, 1)
    whole = survivors(small, 1, 1).replace(FOUR[3].encode(), HOSPITALS[4].encode())
    for request, expected in (
        (storing(job, 1, attempt, signers=HOSPITALS[:3]), Code.PRIVACY_REFUSED),
        (storing(job, 1, attempt, survivors(job, 1, attempt, HOSPITALS[:3]), HOSPITALS[:3]), Code.PRIVACY_REFUSED),
        (forged, Code.STATEMENT_INVALID),
        (storing(job, 1, attempt, b"{}", ()), Code.STATEMENT_INVALID),
        (storing(job, 1, first), Code.WRONG_STATE),
        (storing(job, 1, attempt + 1), Code.WRONG_STATE),
        (storing(job, 2, 1), Code.WRONG_STATE),
        (storing(job, 1, attempt, survivors(job, 1, first)), Code.WRONG_STATE),
        (storing(job, 1, attempt, survivors(other, 1, attempt)), Code.WRONG_STATE),
        (storing(job, 1, attempt, survivors(job, 1, attempt, epoch=2)), Code.WRONG_STATE),
        (storing(job, 1, attempt, details=b"x" * ((4 << 20) + 1)), Code.TOO_LARGE),
        (storing(job, 1, 0, survivors(job, 1, 1)), Code.INVALID_ARGUMENT),
        (storing(small, 1, 1, whole, (*FOUR[:3], HOSPITALS[4])), Code.INVALID_ARGUMENT),
    ):
        assert await code(call(store, request)) is expected, expected
    assert registry.sql("select 1 from registry.survivors") == []
    assert await code(call(registry.operator().StoreSurvivors, storing(job, 1, attempt))) is Code.PERMISSION_DENIED
    await call(store, storing(job, 1, attempt, signers=FOUR))
    assert len((await stored(registry, job)).survivors.confirmations) == 4


async def test_of_two_lists_at_once_one_stands(registry: Registry) -> None:
    job = await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)

    async def store(number: int) -> str:
        statement = survivors(job, 1, attempt, salt=str(number))
        request = storing(job, 1, attempt, statement)
        try:
            await call(registry.service().StoreSurvivors, request, timeout_s=60)
        except FedmeshError as error:
            return error.code.value
        return "stored"

    outcomes = await asyncio.gather(*(store(number) for number in (0, 1, 2, 0, 1, 2)))
    assert sorted(outcomes) == ["stored"] * 2 + [Code.WRONG_STATE.value] * 4
    assert registry.sql("select count(*) from registry.survivors") == [(1,)]


@pytest.mark.parametrize("turn", range(3))
async def test_survivors_and_another_attempt_never_both_come_to_be(registry: Registry, turn: int) -> None:
    job = await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)
    storing_it = call(registry.service().StoreSurvivors, storing(job, 1, attempt), timeout_s=60)
    opening = registry.open_attempt(job.job_id, 1)
    both = [storing_it, opening] if turn % 2 else [opening, storing_it]
    outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert [isinstance(item, FedmeshError) for item in outcomes].count(True) == 1
    attempts = registry.sql("select max(attempt) from registry.attempts")[0][0]
    lists = registry.sql("select attempt from registry.survivors")
    assert (attempts, lists) in [(1, [(1,)]), (2, [])]


async def test_only_the_stored_survivors_commit(registry: Registry) -> None:
    job = await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)
    state = await registry.upload(HOSPITALS[0], job.job_id, b"state")
    commit = registry.service().CommitRound
    assert await code(call(commit, committing(a_round(job, 1, attempt, state)))) is Code.WRONG_STATE
    assert await code(call(commit, burning(job, 1, attempt))) is Code.WRONG_STATE
    four = survivors(job, 1, attempt, FOUR)
    await call(registry.service().StoreSurvivors, storing(job, 1, attempt, four, FOUR))
    contributions = [round_pb2.Contribution(hospital_id=name, ciphertext_sha256="a" * 64) for name in FOUR]
    right = {
        "survivors_sha256": digest(four),
        "contributions": contributions,
        "agreeing": list(FOUR),
        "attesting": list(FOUR[1:]),
    }
    for changes, expected in (
        ({"survivors_sha256": digest(b"other")}, Code.WRONG_STATE),
        ({"survivors_sha256": ""}, Code.INVALID_ARGUMENT),
        ({"contributions": a_round(job, 1, attempt, state).contributions}, Code.INVALID_ARGUMENT),
        ({"agreeing": list(HOSPITALS)}, Code.INVALID_ARGUMENT),
        ({"burnt_reason": "why"}, Code.INVALID_ARGUMENT),
    ):
        told = a_round(job, 1, attempt, state, **{**right, **changes})
        assert await code(call(commit, committing(told))) is expected, changes
    done = (await call(commit, committing(a_round(job, 1, attempt, state, **right)))).job
    assert (done.version, done.state_sha256) == (1, state)
    kept = (await call(registry.operator().ListRounds, pb.ListRoundsRequest(job_id=job.job_id))).rounds[0]
    assert (kept.survivors_sha256, kept.burnt) == (digest(four), False)


async def burn(registry: Registry, job: pb.Job, version: int) -> pb.Job:
    attempt = await registry.open_attempt(job.job_id, version)
    await registry.survive(job, version, attempt)
    response: pb.CommitRoundResponse = await call(registry.service().CommitRound, burning(job, version, attempt))
    return response.job


async def test_a_burnt_version_keeps_the_state_before_it(registry: Registry) -> None:
    job = await registry.job(rounds=4)
    first = await burn(registry, job, 1)
    assert (first.version, first.state_sha256, first.status) == (1, "", pb.JOB_STATUS_RUNNING)
    second = await registry.commit(job, 2)
    state = digest(b"state 2")
    assert second.state_sha256 == state
    third = await burn(registry, job, 3)
    assert (third.version, third.state_sha256) == (3, state)
    asked = pb.GetJobRequest(job_id=job.job_id)
    assert (await call(registry.hospital().GetJob, asked)).job == third
    newest = (
        await call(registry.hospital().GetModelVersion, pb.GetModelVersionRequest(job_id=job.job_id))
    ).model_version
    assert (newest.version, newest.state_sha256, newest.size_bytes, newest.final) == (3, state, len(b"state 2"), False)
    assert (newest.round.burnt, newest.round.burnt_reason, newest.round.finalizer) == (True, "too few", "")
    models = (await call(registry.operator().ListModelVersions, pb.ListModelVersionsRequest())).model_versions
    assert [(item.version, item.state_sha256, item.round.burnt) for item in models] == [
        (3, state, True),
        (2, state, False),
        (1, "", True),
    ]
    rounds = (await call(registry.hospital().ListRounds, pb.ListRoundsRequest(job_id=job.job_id))).rounds
    assert [(item.burnt, len(item.contributions)) for item in rounds] == [(True, 5), (False, 5), (True, 5)]
    fourth = await burn(registry, job, 4)
    assert (fourth.status, fourth.state_sha256) == (pb.JOB_STATUS_COMPLETED, state)
    final = pb.GetModelVersionRequest(job_id=job.job_id, version=4)
    assert (await call(registry.operator().GetModelVersion, final)).model_version.final
    await registry.drained()
    told = [item for item in registry.audit.events if item.type in ("round.burnt", "round.committed")]
    assert [(item.type, json.loads(item.body_json).get("reason")) for item in told] == [
        ("round.burnt", "too few"),
        ("round.committed", None),
        ("round.burnt", "too few"),
        ("round.burnt", "too few"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"state_sha256": "a" * 64},
        {"finalizer": HOSPITALS[0]},
        {"attesting": [HOSPITALS[0]]},
        {"metrics_json": '{"auroc":0.5}'},
        {"contributions": []},
    ],
)
async def test_a_burnt_round_has_nothing_of_a_made_one(registry: Registry, changes: dict[str, Any]) -> None:
    job = await registry.job()
    attempt = await registry.open_attempt(job.job_id, 1)
    await registry.survive(job, 1, attempt)
    commit = registry.service().CommitRound
    assert await code(call(commit, burning(job, 1, attempt, **changes))) is Code.INVALID_ARGUMENT
    request = burning(job, 1, attempt)
    burnt = (await call(commit, request)).job
    request.request_id = new_id()
    assert (await call(commit, request)).job == burnt  # the same round under another id


async def test_a_job_without_any_model_fails(registry: Registry) -> None:
    job = await registry.job(rounds=1)
    ended = await burn(registry, job, 1)
    assert (ended.status, "every round was burnt" in ended.reason) == (pb.JOB_STATUS_FAILED, True)
