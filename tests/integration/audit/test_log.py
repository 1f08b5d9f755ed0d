"""The log over mTLS and PostgreSQL: places, proofs, idempotency, access, growth, restart, replicas."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fedmesh.audit.v1 import audit_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from services.audit.export import export_log
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call, stream
from services.transparency.checkpoint import Checkpoint, generate_key, open_checkpoint
from services.transparency.export import ExportWriter
from services.transparency.merkle import EMPTY_ROOT, leaf_hash, tree_root, verify_consistency, verify_inclusion
from services.transparency.verify import verify_export

from .conftest import CONSORTIUM, Client, Replica, World, event


def require_proofs(response: pb.AppendEventsResponse, replica: Replica) -> Checkpoint:
    """Check an answer as a caller can: signature, and every inclusion proof."""
    checkpoint = open_checkpoint(response.checkpoint, replica.verifier)
    for placed in response.placements:
        verify_inclusion(placed.leaf_hash, placed.index, checkpoint.size, list(placed.inclusion_proof), checkpoint.root)
    return checkpoint


async def entries(client: Client, start: int = 0, limit: int = 0) -> list[tuple[int, bytes]]:
    request = pb.ListEntriesRequest(start_index=start, limit=limit)
    return [(item.index, item.leaf) async for item in stream(client.stub.ListEntries, request, timeout_s=20)]


async def refusal(awaitable: "asyncio.Future[object] | object") -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value


async def test_an_empty_log_has_a_signed_checkpoint_and_nothing_to_prove(world: World, replica: Replica) -> None:
    async with world.client(replica, "hospital") as hospital, world.client(replica, "operator") as operator:
        checkpoint = open_checkpoint(await hospital.checkpoint(), replica.verifier)
        assert checkpoint == Checkpoint("consortium.test/audit", 0, EMPTY_ROOT)
        assert await entries(operator) == []
        error = await refusal(call(hospital.stub.GetInclusionProof, pb.GetInclusionProofRequest()))
        assert error.code is Code.NOT_FOUND
        error = await refusal(call(hospital.stub.GetConsistencyProof, pb.GetConsistencyProofRequest(first_size=1)))
        assert error.code is Code.INVALID_ARGUMENT


async def test_events_get_places_that_anybody_can_prove(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "hospital") as hospital:
        sizes: list[Checkpoint] = []
        for count in (1, 2, 3, 7, 20, 1):
            response = await coordinator.append(*(event(round=number) for number in range(count)))
            sizes.append(require_proofs(response, replica))
        assert [item.size for item in sizes] == [1, 3, 6, 13, 33, 34]
        newest = sizes[-1]
        for older in sizes:
            request = pb.GetConsistencyProofRequest(first_size=older.size)
            proof = await call(hospital.stub.GetConsistencyProof, request)
            assert proof.second_size == 34
            verify_consistency(older.size, 34, older.root, newest.root, list(proof.hashes))
        for index in range(34):
            inclusion = await call(hospital.stub.GetInclusionProof, pb.GetInclusionProofRequest(index=index))
            verify_inclusion(inclusion.leaf_hash, index, 34, list(inclusion.hashes), newest.root)
        past = await call(hospital.stub.GetInclusionProof, pb.GetInclusionProofRequest(index=4, tree_size=13))
        verify_inclusion(past.leaf_hash, 4, 13, list(past.hashes), sizes[3].root)


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=2), Code.NOT_FOUND),
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=1, tree_size=1), Code.NOT_FOUND),
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=2**64 - 1), Code.NOT_FOUND),
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=0, tree_size=3), Code.INVALID_ARGUMENT),
        ("GetConsistencyProof", pb.GetConsistencyProofRequest(), Code.INVALID_ARGUMENT),
        ("GetConsistencyProof", pb.GetConsistencyProofRequest(first_size=3), Code.INVALID_ARGUMENT),
        ("GetConsistencyProof", pb.GetConsistencyProofRequest(first_size=2, second_size=1), Code.INVALID_ARGUMENT),
        (
            "GetConsistencyProof",
            pb.GetConsistencyProofRequest(first_size=1, second_size=2**64 - 1),
            Code.INVALID_ARGUMENT,
        ),
    ],
)
async def test_impossible_proofs_are_refused(
    world: World, replica: Replica, method: str, request_: object, code: Code
) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "operator") as operator:
        await coordinator.append(event(), event())
        assert (await refusal(call(getattr(operator.stub, method), request_))).code is code


async def test_fifty_appenders_get_distinct_dense_indices(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "operator") as operator:

        async def appender(number: int) -> list[int]:
            taken = []
            for step in range(8):
                response = await coordinator.append(event(appender=number, step=step))
                require_proofs(response, replica)
                taken.append(response.placements[0].index)
            return taken

        places = await asyncio.gather(*(appender(number) for number in range(50)))
        assert all(taken == sorted(taken) for taken in places)
        assert sorted(index for taken in places for index in taken) == list(range(400))
        listed = await entries(operator)
        checkpoint = open_checkpoint(await operator.checkpoint(), replica.verifier)
        assert [index for index, _ in listed] == list(range(400))
        assert tree_root(leaf_hash(leaf) for _, leaf in listed) == checkpoint.root


async def test_an_event_is_in_the_log_once_however_often_it_is_sent(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "operator") as operator:
        first, second = event(round=1), event(round=2)
        before = await coordinator.append(first)
        await coordinator.append(*(event() for _ in range(5)))
        again = await asyncio.gather(*(coordinator.append(second, first, second) for _ in range(10)))
        for response in again:
            require_proofs(response, replica)
            assert [placed.index for placed in response.placements] == [6, 0, 6]
            assert response.placements[1].leaf_hash == before.placements[0].leaf_hash
        assert len(await entries(operator)) == 7


async def test_an_event_id_cannot_be_given_another_meaning(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "registry") as registry:
        taken = event(round=1)
        await coordinator.append(taken)
        changed = pb.Event()
        changed.CopyFrom(taken)
        changed.body_json = '{"round":2}'
        answers = await asyncio.gather(
            coordinator.append(event(), changed),
            coordinator.append(event(round=9)),
            registry.append(taken),
            return_exceptions=True,
        )
        codes = [answer.code if isinstance(answer, FedmeshError) else answer for answer in answers]
        assert codes[0] is Code.REQUEST_ID_REUSED
        assert codes[2] is Code.REQUEST_ID_REUSED
        # Nothing of the refused requests is in the log, and the one between them is.
        assert isinstance(answers[1], pb.AppendEventsResponse)
        assert answers[1].placements[0].index == 1
        assert open_checkpoint(await coordinator.checkpoint(), replica.verifier).size == 2


@pytest.mark.parametrize(
    "bad",
    [
        pb.Event(event_id="17"),
        pb.Event(occurred_at=Timestamp(seconds=2**60)),
        pb.Event(occurred_at=Timestamp(nanos=10**9 - 1 - 2**31)),
        pb.Event(type="nonsense"),
        pb.Event(body_json='{"patient_nbr":17}'),
        pb.Event(body_json='{"text":"' + "x" * 70_000 + '"}'),
        pb.Event(body_json="{"),
    ],
)
async def test_a_bad_event_harms_its_own_request_only(world: World, replica: Replica, bad: pb.Event) -> None:
    async with world.client(replica) as coordinator:
        wrong = event()
        wrong.MergeFrom(bad)
        answers = await asyncio.gather(
            coordinator.append(event(), wrong), coordinator.append(event()), return_exceptions=True
        )
        assert isinstance(answers[0], FedmeshError)
        assert answers[0].code is Code.INVALID_ARGUMENT
        assert isinstance(answers[1], pb.AppendEventsResponse)
        assert answers[1].placements[0].index == 0


async def test_malformed_requests_are_refused(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator:
        assert (await refusal(coordinator.append())).code is Code.INVALID_ARGUMENT
        assert (await refusal(coordinator.append(*(event() for _ in range(501))))).code is Code.INVALID_ARGUMENT
        untimed = event()
        untimed.ClearField("occurred_at")
        assert (await refusal(coordinator.append(untimed))).code is Code.INVALID_ARGUMENT
        request = pb.AppendEventsRequest(request_id="17", events=[event()])
        assert (await refusal(call(coordinator.stub.AppendEvents, request))).code is Code.INVALID_ARGUMENT
        response = await coordinator.append(*(event() for _ in range(500)))
        assert require_proofs(response, replica).size == 500


async def test_only_services_append_and_only_operators_read_everything(world: World, replica: Replica) -> None:
    for who in ("hospital", "operator"):
        async with world.client(replica, who) as client:
            assert (await refusal(client.append(event()))).code is Code.PERMISSION_DENIED
    for who in ("hospital", "coordinator"):
        async with world.client(replica, who) as client:
            assert (await refusal(entries(client))).code is Code.PERMISSION_DENIED
    # The log holds its own refusals too.
    told: list[Any] = []
    async with world.client(replica, "operator") as operator, asyncio.timeout(60):
        while len(told) < 4:
            await asyncio.sleep(0.02)
            told = [json.loads(leaf) for _, leaf in await entries(operator)]
    assert {(leaf["type"], leaf["source"]) for leaf in told} == {
        ("access.refused", f"spiffe://{CONSORTIUM}/service/audit")
    }
    assert {(leaf["subject"], leaf["body"]["method"]) for leaf in told} == {
        ("hospital/hospital", "AuditService/AppendEvents"),
        ("operator/operator", "AuditService/AppendEvents"),
        ("hospital/hospital", "AuditService/ListEntries"),
        ("service/coordinator", "AuditService/ListEntries"),
    }


async def test_entries_are_read_by_pages_from_any_place(world: World, replica: Replica) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "operator") as operator:
        for start in range(0, 1100, 275):
            await coordinator.append(*(event(number=start + step) for step in range(275)))
        assert [index for index, _ in await entries(operator)] == list(range(1100))
        assert [index for index, _ in await entries(operator, 499, 503)] == list(range(499, 1002))
        assert [index for index, _ in await entries(operator, 1098, 50)] == [1098, 1099]
        assert await entries(operator, 1100) == []
        assert await entries(operator, 2**63, 2**63) == []


async def test_a_restart_continues_the_same_log(world: World) -> None:
    async with world.replica() as replica, world.client(replica) as coordinator:
        before = require_proofs(await coordinator.append(*(event() for _ in range(11))), replica)
    async with world.replica() as replica, world.client(replica) as coordinator:
        await replica.log.require_own_log()
        assert open_checkpoint(await coordinator.checkpoint(), replica.verifier) == before
        after = require_proofs(await coordinator.append(event()), replica)
        assert after.size == 12
        _, proof = await replica.log.consistency(11, 12)
        verify_consistency(11, 12, before.root, after.root, proof)


async def test_two_replicas_write_one_history(world: World) -> None:
    async with (
        world.replica() as left,
        world.replica() as right,
        world.client(left) as first,
        world.client(right) as second,
        world.client(left, "operator") as operator,
    ):
        shared = [event(shared=number) for number in range(20)]

        async def appender(client: Client, number: int) -> list[pb.AppendEventsResponse]:
            own = [await client.append(event(number=number, step=step)) for step in range(5)]
            return [*own, await client.append(shared[number])]

        answers = await asyncio.gather(
            *(appender(client, number) for client in (first, second) for number in range(20))
        )
        heads = {require_proofs(response, left) for responses in answers for response in responses}
        listed = await entries(operator)
        assert [index for index, _ in listed] == list(range(220))
        hashes = [leaf_hash(leaf) for _, leaf in listed]
        for head in heads:
            assert tree_root(hashes[: head.size]) == head.root
        for left_answers, right_answers in zip(answers[:20], answers[20:], strict=True):
            assert left_answers[-1].placements[0].index == right_answers[-1].placements[0].index


async def test_too_many_waiting_events_are_told_to_come_again(world: World) -> None:
    async with world.replica(max_queued_events=3) as replica, world.client(replica) as coordinator:
        error = await refusal(coordinator.append(*(event() for _ in range(4))))
        assert error.code is Code.RATE_LIMITED
        assert error.retryable
        await coordinator.append(event(), event(), event())


async def test_a_batch_limit_splits_the_queue_and_loses_nothing(world: World) -> None:
    async with world.replica(max_events=3) as replica, world.client(replica) as coordinator:
        answers = await asyncio.gather(*(coordinator.append(*(event() for _ in range(2))) for _ in range(20)))
        assert sorted(placed.index for response in answers for placed in response.placements) == list(range(40))


async def test_a_log_is_extended_with_its_own_key_only(world: World, tmp_path: Path) -> None:
    async with world.replica() as replica, world.client(replica) as coordinator:
        await coordinator.append(event())
    world.key_file.unlink()
    generate_key(world.key_file, "consortium.test/audit")
    async with world.replica() as replica:
        assert (await refusal(replica.log.require_own_log())).code is Code.CONFIG_INVALID


async def test_exports_through_the_service_and_from_the_database_are_equal_and_verify(
    world: World, replica: Replica, tmp_path: Path
) -> None:
    async with world.client(replica) as coordinator, world.client(replica, "operator") as operator:
        await coordinator.append(*(event(number=number, text="\u00e9") for number in range(40)))
        note = await operator.checkpoint()
        with ExportWriter(tmp_path / "served") as writer:
            for index, leaf in await entries(operator, 0, 40):
                writer.add(index, leaf)
            writer.finish(note, replica.verifier)
    await export_log(world.postgres.config("audit_service"), tmp_path / "stored", replica.verifier)
    for folder in ("served", "stored"):
        report = verify_export(tmp_path / folder, str(replica.verifier))
        assert (report.size, report.trusted) == (40, True)
    for path in (tmp_path / "served").iterdir():
        assert path.read_bytes() == (tmp_path / "stored" / path.name).read_bytes()
