"""The aggregator as a real process with real masked ciphertexts: counted exactly once, and summed exactly."""

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedmesh.aggregator.v1 import aggregator_pb2 as pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as rpc
from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import CHUNK_BYTES, PART_BYTES, MeshChannel, call, stream
from services.common.ids import new_id
from services.secure_sum import masks, opening, public, secret
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1, DEFAULT
from services.secure_sum.statements import Upload as UploadStatement
from services.secure_sum.statements import parse, sign
from tests.support.aggregation import GROUP_KEY, Attempt, Centre, Upload, running_centre
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis

LONG = 131_072 * 2 + 11
"""Values in three segments, the last one short."""


@pytest.fixture(params=["redis", "directory"])
async def centre(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Centre]:
    """One aggregator, over both stores of chunks."""
    sections = {} if request.param == "redis" else in_directory(tmp_path)
    async with running_centre(tmp_path, redis_server, **sections) as running:
        yield running


@pytest.fixture
async def redis_centre(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Centre]:
    async with running_centre(tmp_path, redis_server) as running:
        yield running


def in_directory(folder: Path) -> dict[str, Any]:
    (folder / "chunks").mkdir()
    return {"chunks": {"directory": str(folder / "chunks"), "sweep_s": 0.2}}


def stored(folder: Path) -> list[Path]:
    return list(folder.glob("chunks/*"))


async def code_of(awaitable: Any) -> Code:
    with pytest.raises(FedmeshError) as caught:
        await awaitable
    return caught.value.code


async def test_a_sum_of_several_segments_with_a_dropout_is_exact(centre: Centre) -> None:
    attempt = Attempt.of(centre, 5, LONG)
    assert await attempt.open() == len(attempt.upload_of("hospital-01").content)
    survivors = attempt.sharers[:4]
    for number, name in enumerate(survivors, 1):
        # In parts, and in whole segments as well.
        answer = await attempt.send(name, part_bytes=(PART_BYTES, CHUNK_BYTES)[number % 2])
        assert (answer.contributors, answer.already_counted) == (number, False)
        assert answer.contribution.ciphertext_sha256 == attempt.upload_of(name).sha256
    assert await code_of(attempt.download("hospital-01")) is Code.WRONG_STATE
    assert await code_of(attempt.segments("hospital-01", 0)) is Code.WRONG_STATE
    closed = await attempt.close(4)
    assert [item.hospital_id for item in closed.contributions] == survivors
    assert await code_of(attempt.download("hospital-01")) is Code.WRONG_STATE
    opened = attempt.unmask()
    computed = await attempt.compute(survivors, opened)
    assert computed.size_bytes == attempt.layout.sum_bytes
    assert await attempt.compute(survivors, opened) == computed
    total = await attempt.opened(survivors)
    state = await attempt.get()
    assert (state.state, state.sum_sha256) == (pb.SUM_STATE_COMPUTED, computed.sum_sha256)
    # A hospital checks the sum from the uploads, whose hashes stand in signed statements.
    keys = opening.mask_keys(attempt.consortium.adverts, attempt.consortium.roster, attempt.sharers)
    plan = opening.correction(attempt.consortium.attempt, keys, survivors, opened)
    for index in range(attempt.layout.segments):
        found = await attempt.segments("hospital-05", index)
        assert list(found) == survivors
        assert await attempt.segments("hospital-05", index, in_parts=False) == found
        uploads = list(found.values())
        assert uploads == [attempt.upload_of(name).segments[index] for name in survivors]
        correction = masks.coefficients(plan, *attempt.layout.coefficients(index))
        assert public.sum_segment(attempt.layout, index, uploads, correction) == total[index]
    assert not centre.strikes()


async def test_a_sum_under_a_public_key_is_exact_and_takes_nothing_else(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4, vector_length=9001, parameters=BFV_N4096_Q60_T44_PK_V1.name)
    *survivors, dropped = attempt.sharers
    assert await attempt.open() == attempt.layout.upload_bytes == attempt.layout.sum_bytes
    first = survivors[0]
    whole = attempt.upload_of(first)
    statement = parse(UploadStatement, whole.signed.statement)

    async def refused(segment: bytes, **changes: Any) -> Code:
        hashed = hashlib.sha256(segment).hexdigest()
        said = statement.model_copy(update={"ciphertext_sha256": hashed, "segments": (hashed,), **changes})
        return await code_of(attempt.send(first, Upload(sign(said, attempt.consortium.keys[first]), [segment])))

    content = whole.segments[0]
    for place in (0, len(content) - 15):
        assert await refused(content[:place] + b"\xff" * 15 + content[place + 15 :]) is Code.CIPHERTEXT_INVALID
    assert await refused(content[:-1]) is Code.CHUNK_STREAM_INVALID
    assert await refused(content, parameter_set=DEFAULT.name) is Code.STATEMENT_INVALID
    seeded = _changed(attempt.form(), parameter_set=DEFAULT.name)
    assert await code_of(attempt.send(first, form=seeded)) is Code.CIPHERTEXT_INVALID
    await attempt.send_all(survivors)
    await attempt.close(3)
    await attempt.compute(survivors, attempt.unmask())
    assert dropped not in attempt.uploads
    await attempt.opened(survivors)


async def test_uploads_are_counted_once(centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    await attempt.open()
    await attempt.open()
    first = await attempt.send("hospital-01")
    again = await attempt.send("hospital-01")
    assert (first.contributors, first.already_counted) == (1, False)
    assert (again.contributors, again.already_counted) == (1, True)
    assert await code_of(attempt.close(2)) is Code.WRONG_STATE
    assert (await attempt.send("hospital-02")).contributors == 2
    closed = await attempt.close(2)
    assert await attempt.close(2) == closed
    assert await code_of(attempt.send("hospital-03")) is Code.WRONG_STATE
    assert (await attempt.send("hospital-01")).already_counted
    assert centre.registry.event_types() == ["contribution.accepted"] * 2
    assert not centre.strikes()


async def test_only_the_group_sees_uploads_and_sum(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4, sharers=3)
    await attempt.open()
    await attempt.send_all(["hospital-01", "hospital-02"])
    await attempt.close(2)
    for refused in (
        attempt.download("hospital-04"),
        attempt.segments("hospital-04", 0),
    ):
        assert await code_of(refused) is Code.PERMISSION_DENIED
    assert await code_of(attempt.segments("hospital-03", 1)) is Code.INVALID_ARGUMENT
    assert list(await attempt.segments("hospital-03", 0)) == ["hospital-01", "hospital-02"]
    assert list(await attempt.segments("hospital-01", 0)) == ["hospital-02"]


async def test_an_attempt_has_one_sum(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4)
    await attempt.open()
    await attempt.send_all(attempt.sharers)
    opened = attempt.unmask()
    assert await code_of(attempt.compute(attempt.sharers, opened)) is Code.WRONG_STATE
    await attempt.close(4)
    # A wrong seed is refused before anything is fixed; so is a sum over fewer than were opened.
    wrong = opening.Opening({**opened.self_seeds, "hospital-02": bytes(16)}, opened.mask_seeds)
    assert await code_of(attempt.compute(attempt.sharers, wrong)) is Code.STATEMENT_INVALID
    assert await code_of(attempt.compute(attempt.sharers[:3], opened)) is Code.STATEMENT_INVALID
    assert await code_of(attempt.compute(attempt.sharers, opened, mask_keys=[])) is Code.INVALID_ARGUMENT
    await attempt.compute(attempt.sharers, opened)
    # Seeds that fit, of a hospital that is now said to have dropped out: another sum, which must never be.
    fewer, seed = attempt.sharers[1:], attempt.consortium.states["hospital-01"].mask_seed
    self_seeds = {name: opened.self_seeds[name] for name in fewer}
    other = opening.Opening(self_seeds, {"hospital-01": seed})
    assert await code_of(attempt.compute(fewer, other)) is Code.EQUIVOCATION
    await attempt.opened(attempt.sharers)


async def test_replicas_count_and_compute_the_same_at_the_same_time(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_centre(tmp_path, redis_server, aggregators=2, **in_directory(tmp_path)) as centre:
        attempt = Attempt.of(centre, 6, LONG)
        await attempt.open()
        for name in attempt.sharers:
            attempt.upload_of(name)
        # Everyone uploads to both replicas at once, as after a broken connection.
        answers = await asyncio.gather(
            *(attempt.send(name, replica=replica) for name in attempt.sharers for replica in (0, 1))
        )
        assert sum(not answer.already_counted for answer in answers) == 6
        assert len((await attempt.close(6)).contributions) == 6
        opened = attempt.unmask()
        sums = await asyncio.gather(
            *(attempt.compute(attempt.sharers, opened, replica) for replica in (0, 1) for _ in range(2))
        )
        assert len({computed.sum_sha256 for computed in sums}) == 1
        await attempt.opened(attempt.sharers, replica=1)
        assert centre.registry.event_types() == ["contribution.accepted"] * 6
        await attempt.discard()
        await attempt.discard()
        assert await code_of(attempt.get()) is Code.NOT_FOUND


async def test_a_killed_replica_loses_and_doubles_nothing(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 6, LONG)
    process = redis_centre.aggregators[0]
    await attempt.open()
    for name in attempt.sharers:
        attempt.upload_of(name)

    async def upload(name: str) -> None:
        while True:
            try:
                await attempt.send(name)
                return
            except FedmeshError as error:
                if not error.retryable and error.code is not Code.CANCELLED:
                    raise
                await asyncio.sleep(0.1)

    uploads = [asyncio.create_task(upload(name)) for name in attempt.sharers]
    await asyncio.wait(uploads, return_when=asyncio.FIRST_COMPLETED)
    await process.stop(signal.SIGKILL)
    await process.start()
    await asyncio.gather(*uploads)
    assert len((await attempt.close(6)).contributions) == 6
    opened = attempt.unmask()
    computing = asyncio.create_task(attempt.compute(attempt.sharers, opened))
    await asyncio.sleep(0.05)
    await process.stop(signal.SIGKILL)
    await process.start()
    await asyncio.gather(computing, return_exceptions=True)
    await attempt.compute(attempt.sharers, opened)
    await attempt.opened(attempt.sharers)
    assert redis_centre.registry.event_types().count("contribution.accepted") == 6


async def test_lost_segments_are_mended_by_the_same_bytes(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_centre(tmp_path, redis_server, **in_directory(tmp_path)) as centre:
        attempt = Attempt.of(centre, 4, LONG)
        await attempt.open()
        await attempt.send_all(attempt.sharers)
        await attempt.close(4)
        opened = attempt.unmask()
        folders = sorted((tmp_path / "chunks").iterdir())
        (folders[0] / "1").unlink()
        torn = folders[1] / "2"
        torn.write_bytes(torn.read_bytes()[:100])
        assert await code_of(attempt.compute(attempt.sharers, opened)) is Code.NOT_FOUND
        for name in attempt.sharers:
            assert (await attempt.send(name)).already_counted
        computed = await attempt.compute(attempt.sharers, opened)
        (result,) = set((tmp_path / "chunks").iterdir()) - set(folders)
        (result / "0").unlink()
        assert await code_of(attempt.download("hospital-01")) is Code.NOT_FOUND
        assert await attempt.compute(attempt.sharers, opened) == computed
        await attempt.opened(attempt.sharers)


async def test_a_sum_is_opened_with_one_content(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4)
    await attempt.open()
    keys = [pb.SignerKey(hospital_id=name, signing_key=bytes(32)) for name in attempt.sharers]
    for changes in (
        {"group": attempt.sharers[:3], "signers": keys[:3]},
        {"form": _changed(attempt.form(), vector_length=5)},
        {"signers": keys},
        {"adverts_sha256": "ab" * 32},
    ):
        assert await code_of(attempt.open(**changes)) is Code.ALREADY_EXISTS
    bad: list[dict[str, Any]] = [
        {"expires_at": Timestamp(seconds=1)},
        {"group": attempt.sharers[::-1]},
        {"group": attempt.sharers[:1], "signers": keys[:1]},
        {"signers": keys[:3]},
        {"signers": [*keys, keys[0]]},
        {"adverts_sha256": "no"},
        {"form": _changed(attempt.form(), parameter_set="ckks")},
        {"form": _changed(attempt.form(), lanes=3)},
        {"form": _changed(attempt.form(), vector_length=0)},
    ]
    for changes in bad:
        assert await code_of(attempt.open(**changes)) is Code.INVALID_ARGUMENT


def _changed(form: round_pb2.SumForm, **changes: Any) -> round_pb2.SumForm:
    fields: dict[str, Any] = {
        "parameter_set": form.parameter_set,
        "lanes": form.lanes,
        "vector_length": form.vector_length,
    }
    return round_pb2.SumForm(**(fields | changes))


async def test_events_are_made_up_for_while_the_registry_was_away(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4)
    await attempt.open()
    registry = redis_centre.registry
    registry.away = True
    for name in ("hospital-01", "hospital-02"):
        assert await code_of(attempt.send(name)) is Code.SERVICE_UNAVAILABLE
    # A strike is not lost either: the answer is "try again" until it is recorded.
    assert await code_of(attempt.send("hospital-03", size_bytes=1)) is Code.SERVICE_UNAVAILABLE
    registry.away = False
    assert await code_of(attempt.send("hospital-03", size_bytes=1)) is Code.CIPHERTEXT_INVALID
    assert redis_centre.strikes() == [("hospital-03", "ciphertext-invalid")]
    assert (await attempt.send("hospital-01")).already_counted
    assert registry.event_types().count("contribution.accepted") == 1
    await attempt.close(2)
    assert registry.event_types().count("contribution.accepted") == 2


async def test_everything_is_forgotten_at_its_time(tmp_path: Path, redis_server: RedisServer, centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    attempt.upload_of("hospital-01")
    await attempt.open(lifetime_s=6)
    await attempt.send("hospital-01")
    with redis_server.client() as admin:
        keys = list(admin.scan_iter("*"))
        assert len(keys) + len(stored(tmp_path)) == 2
        assert all(key.startswith(b"aggregator:") and admin.pttl(key) > 0 for key in keys)
        while list(admin.scan_iter("*")) or stored(tmp_path):  # noqa: ASYNC110 - they decide
            await asyncio.sleep(0.1)
    assert await code_of(attempt.send("hospital-02")) is Code.NOT_FOUND


async def test_a_discarded_sum_leaves_nothing(tmp_path: Path, redis_server: RedisServer, centre: Centre) -> None:
    attempt = Attempt.of(centre, 4)
    await attempt.open()
    await attempt.send_all(attempt.sharers)
    await attempt.close(4)
    await attempt.compute(attempt.sharers, attempt.unmask())
    await attempt.discard()
    with redis_server.client() as admin:
        assert not list(admin.scan_iter("*"))
    assert not stored(tmp_path)
    assert await code_of(attempt.send("hospital-01")) is Code.NOT_FOUND
    await attempt.discard()


async def test_what_the_centre_stores_decrypts_to_noise(redis_centre: Centre) -> None:
    """Even with the group key: every stored upload is masked."""
    attempt = Attempt.of(redis_centre, 4)
    await attempt.open()
    await attempt.send_all(attempt.sharers)
    await attempt.close(4)
    found = await attempt.segments("hospital-01", 0) | await attempt.segments("hospital-02", 0)
    assert sorted(found) == sorted(attempt.sharers)
    for name, segment in found.items():
        zero = np.zeros(attempt.layout.coefficients(0)[1], dtype=np.uint64)
        alone = public.sum_segment(attempt.layout, 0, [segment], zero)
        assert np.mean(secret.decrypt_segments([alone], GROUP_KEY, attempt.layout) == attempt.values[name]) < 0.1


async def test_access(redis_centre: Centre) -> None:
    attempt = Attempt.of(redis_centre, 4)
    ca = redis_centre.ca
    for tls in (ca.issue_hospital("hospital-01"), ca.issue_operator("olga"), ca.issue_service("registry")):
        async with MeshChannel(redis_centre.aggregators[0].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            for method, request in (
                (stub.CloseSum, pb.CloseSumRequest(request_id=new_id(), attempt=attempt.ids)),
                (stub.ComputeSum, pb.ComputeSumRequest(request_id=new_id(), attempt=attempt.ids)),
            ):
                assert await code_of(call(method, request, timeout_s=120)) is Code.PERMISSION_DENIED
    async with MeshChannel(redis_centre.aggregators[0].target, ca.issue_service("coordinator")) as channel:
        responses = stream(
            channel.stub(rpc.AggregatorServiceStub).GetSegments, pb.GetSegmentsRequest(attempt=attempt.ids)
        )
        assert await code_of(anext(responses)) is Code.PERMISSION_DENIED
