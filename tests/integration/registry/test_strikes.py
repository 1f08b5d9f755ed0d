"""Strikes count within a window; the one that reaches the limit suspends."""

import asyncio
import json
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import Registry, code, striking

LIMIT = 3  # as the harness configures it


async def strike(registry: Registry, **changes: Any) -> pb.RecordStrikeResponse:
    response: pb.RecordStrikeResponse = await call(
        registry.service("aggregator").RecordStrike, striking("north", **changes), timeout_s=60
    )
    return response


async def status(registry: Registry) -> tuple[int, int]:
    found = (await call(registry.operator().ListHospitals, pb.ListHospitalsRequest())).hospitals[0]
    return found.status, found.strikes


async def test_the_limit_suspends(registry: Registry) -> None:
    await registry.register("north")
    attempt = round_pb2.Attempt(job_id=new_id(), round=2, attempt=3)
    once = new_id()
    for _ in range(2):
        first = await strike(registry, request_id=once, attempt=attempt)
        assert (first.strikes, first.suspended) == (1, False)
    assert (await strike(registry)).strikes == 2
    assert await status(registry) == (pb.HOSPITAL_STATUS_ACTIVE, 2)
    await call(registry.hospital("north").ListRosters, pb.ListRostersRequest())
    third = await strike(registry)
    assert (third.strikes, third.suspended) == (3, True)
    assert await status(registry) == (pb.HOSPITAL_STATUS_SUSPENDED, 3)
    asked = call(registry.hospital("north").ListRosters, pb.ListRostersRequest())
    assert await code(asked) is Code.PERMISSION_DENIED
    fourth = await strike(registry)
    assert (fourth.strikes, fourth.suspended) == (4, True)
    await registry.drained()
    assert registry.audit.types() == [
        "hospital.registered",
        *["hospital.strike"] * 3,
        "hospital.suspended",
        "hospital.strike",
    ]
    told = json.loads(registry.audit.events[1].body_json)
    assert (told["code"], told["job_id"], told["round"], told["strikes"]) == (
        "ciphertext-invalid",
        attempt.job_id,
        2,
        1,
    )
    # Reinstated, it begins anew.
    await registry.decide("reinstate", "north")
    assert await status(registry) == (pb.HOSPITAL_STATUS_ACTIVE, 0)
    assert (await strike(registry)).strikes == 1


async def test_old_strikes_do_not_count(registry: Registry) -> None:
    await registry.register("north")
    for _ in range(LIMIT - 1):
        await strike(registry)
    registry.sql("update registry.strikes set at = at - interval '61 seconds'")
    assert (await strike(registry)).strikes == 1
    assert await status(registry) == (pb.HOSPITAL_STATUS_ACTIVE, 1)


async def test_strikes_at_once_are_all_counted(registry: Registry) -> None:
    await registry.register("north")
    answers = await asyncio.gather(*(strike(registry) for _ in range(LIMIT)))
    assert sorted(item.strikes for item in answers) == [1, 2, 3]
    assert [item.suspended for item in answers].count(True) == 1
    assert await status(registry) == (pb.HOSPITAL_STATUS_SUSPENDED, 3)


async def test_a_removed_hospital_stays_removed(registry: Registry) -> None:
    await registry.register("north")
    await registry.decide("remove", "north")
    for number in range(1, LIMIT + 2):
        answer = await strike(registry)
        assert (answer.strikes, answer.suspended) == (number, True)
    assert (await status(registry))[0] == pb.HOSPITAL_STATUS_REMOVED
    await registry.drained()
    assert "hospital.suspended" not in registry.audit.types()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code": "Not A Slug"}, Code.INVALID_ARGUMENT),
        ({"code": ""}, Code.INVALID_ARGUMENT),
        ({"reason": "x" * 501}, Code.INVALID_ARGUMENT),
        ({"request_id": "1"}, Code.INVALID_ARGUMENT),
        ({"attempt": round_pb2.Attempt(job_id="1", round=1, attempt=1)}, Code.INVALID_ARGUMENT),
        ({"attempt": round_pb2.Attempt(round=0, attempt=1)}, Code.INVALID_ARGUMENT),
    ],
)
async def test_a_strike_that_cannot_be_is_refused(registry: Registry, changes: dict[str, Any], expected: Code) -> None:
    await registry.register("north")
    assert await code(strike(registry, **changes)) is expected
    assert registry.sql("select 1 from registry.strikes") == []


async def test_strikes_are_for_services_against_hospitals_that_exist(registry: Registry) -> None:
    assert await code(strike(registry)) is Code.NOT_FOUND
    await registry.register("north")
    for stub in (registry.hospital("north"), registry.operator()):
        assert await code(call(stub.RecordStrike, striking("north"))) is Code.PERMISSION_DENIED
