"""The aggregator as a real process with real ciphertexts: exactly once, or clearly refused."""

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedmesh.aggregator.v1 import aggregator_pb2 as pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as rpc
from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, chunks
from services.common.ids import new_id
from services.secure_sum import secret
from tests.support.mesh import Mesh, running_mesh
from tests.support.stores import RedisServer


@pytest.fixture
async def mesh(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path, redis_server, hospitals=5, coordinators=0) as running:
        yield running


class Sums:
    """The coordinator's side, and raw uploads."""

    def __init__(self, mesh: Mesh, group: list[str] | None = None) -> None:
        self.mesh = mesh
        self.attempt = round_pb2.Attempt(job_id=new_id(), round=1, attempt=1)
        self.group = group or list(mesh.hospitals)
        self.form = mesh.hospitals["h01"].form()

    async def coordinate(self, method: str, request: Any) -> Any:
        tls = self.mesh.ca.issue_service("coordinator")
        async with MeshChannel(self.mesh.aggregators[0].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            return await call(getattr(stub, method), request, timeout_s=5, patience_s=20)

    async def open(self, **changes: Any) -> int:
        expires_at = Timestamp()
        expires_at.FromDatetime(datetime.now(UTC) + timedelta(minutes=5))
        fields: dict[str, Any] = {
            "attempt": self.attempt,
            "form": self.form,
            "group": self.group,
            "expires_at": expires_at,
        }
        request = pb.OpenSumRequest(request_id=new_id(), **(fields | changes))
        return int((await self.coordinate("OpenSum", request)).upload_bytes)

    async def close(self, minimum: int = 1) -> pb.CloseSumResponse:
        request = pb.CloseSumRequest(request_id=new_id(), attempt=self.attempt, minimum_contributors=minimum)
        return await self.coordinate("CloseSum", request)  # type: ignore[no-any-return]

    async def get(self) -> pb.GetSumResponse:
        return await self.coordinate("GetSum", pb.GetSumRequest(attempt=self.attempt))  # type: ignore[no-any-return]

    async def upload(self, name: str, content: bytes, *, replica: int = 0, **header: Any) -> pb.UploadResponse:
        """Upload with a header that is right, but for what `header` changes."""
        fields: dict[str, Any] = {
            "request_id": new_id(),
            "attempt": self.attempt,
            "form": self.form,
            "size_bytes": len(content),
            "ciphertext_sha256": hashlib.sha256(content).hexdigest(),
        } | header

        def messages() -> Any:
            yield pb.UploadRequest(header=pb.UploadHeader(**fields))
            for chunk in chunks(content):
                yield pb.UploadRequest(chunk=chunk)

        tls = self.mesh.hospitals[name].tls if name in self.mesh.hospitals else self.mesh.ca.issue_hospital(name)
        async with MeshChannel(self.mesh.aggregators[replica].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            return await call(stub.Upload, messages, timeout_s=10)  # type: ignore[no-any-return]

    async def refused(self, name: str, content: bytes, **header: Any) -> Code:
        with pytest.raises(FedmeshError) as caught:
            await self.upload(name, content, **header)
        return caught.value.code

    async def ciphertext(self, name: str) -> bytes:
        return await self.mesh.hospitals[name].ciphertext(self.attempt)

    async def opened(self, names: list[str]) -> Any:
        """The plaintext of the closed sum, after checking that it is the sum of these hospitals' values."""
        total = await self.mesh.hospitals[names[0]].download(self.attempt)
        plain = secret.decrypt(total, self.mesh.group_key, self.form.vector_length, self.form.lanes)
        expected = sum(self.mesh.hospitals[name].values(1, 1) for name in names)
        assert np.array_equal(plain, expected)
        return plain

    def strikes(self) -> list[str]:
        return [item.subject for item in self.mesh.registry.events.values() if item.type == "call.refused"]


async def test_uploads_are_counted_once(mesh: Mesh) -> None:
    sums = Sums(mesh, ["h01", "h02", "h03"])
    content = {name: await sums.ciphertext(name) for name in sums.group}
    assert await sums.open() == len(content["h01"])
    await sums.open()
    first = await sums.upload("h01", content["h01"])
    assert (first.contributors, first.already_counted) == (1, False)
    again = await sums.upload("h01", content["h01"])
    assert (again.contributors, again.already_counted) == (1, True)
    assert (await sums.upload("h02", content["h02"])).contributors == 2
    with pytest.raises(FedmeshError) as early:
        await mesh.hospitals["h01"].download(sums.attempt)
    assert early.value.code is Code.WRONG_STATE
    with pytest.raises(FedmeshError) as few:
        await sums.close(3)
    assert few.value.code is Code.WRONG_STATE
    closed = await sums.close(2)
    assert [item.hospital_id for item in closed.contributions] == ["h01", "h02"]
    assert await sums.close(2) == closed
    await sums.opened(["h01", "h02"])
    assert await sums.refused("h03", content["h03"]) == Code.WRONG_STATE
    assert (await sums.upload("h01", content["h01"])).already_counted
    with pytest.raises(FedmeshError) as outside:
        await mesh.hospitals["h04"].download(sums.attempt)
    assert outside.value.code is Code.PERMISSION_DENIED
    assert mesh.registry.event_types().count("contribution.accepted") == 2
    await sums.coordinate("DiscardSum", pb.DiscardSumRequest(request_id=new_id(), attempt=sums.attempt))
    await sums.coordinate("DiscardSum", pb.DiscardSumRequest(request_id=new_id(), attempt=sums.attempt))
    assert await sums.refused("h01", content["h01"]) == Code.NOT_FOUND
    assert not sums.strikes()


async def test_bad_uploads_are_refused_and_change_nothing(mesh: Mesh) -> None:
    sums = Sums(mesh)
    good = await sums.ciphertext("h01")
    await sums.open()
    await sums.upload("h02", await sums.ciphertext("h02"))
    other = sums.form.__class__()
    other.CopyFrom(sums.form)
    other.lanes = 3 - sums.form.lanes
    above_q = good[:64] + b"\xff" * 15 + good[79:]
    wrong_set = good[:8] + b"bfv-other".ljust(32, b"\0") + good[40:]
    a_sum = b"FMSS" + good[4:]
    right = {"size_bytes": len(good), "ciphertext_sha256": hashlib.sha256(good).hexdigest()}
    cases: list[tuple[bytes, dict[str, Any], Code]] = [
        (good[:-1], right, Code.CHUNK_STREAM_INVALID),
        (good + b"x", right, Code.CHUNK_STREAM_INVALID),
        (good[:-1] + bytes([good[-1] ^ 1]), right, Code.CHUNK_STREAM_INVALID),
        (b"", right, Code.CHUNK_STREAM_INVALID),
        (good[:-1], {}, Code.CIPHERTEXT_INVALID),
        (good + b"x", {}, Code.CIPHERTEXT_INVALID),
        (good, {"form": other}, Code.CIPHERTEXT_INVALID),
        (above_q, {}, Code.CIPHERTEXT_INVALID),
        (wrong_set, {}, Code.CIPHERTEXT_INVALID),
        (a_sum, {}, Code.CIPHERTEXT_INVALID),
        (bytes(len(good)), {}, Code.CIPHERTEXT_INVALID),
    ]
    for content, header, code in cases:
        assert await sums.refused("h01", content, **header) == code
    assert sums.strikes() == ["hospital/h01"] * len(cases)
    assert [item.hospital_id for item in (await sums.get()).contributions] == ["h02"]
    assert await sums.refused("stranger", good) == Code.PERMISSION_DENIED
    replayed = round_pb2.Attempt(job_id=sums.attempt.job_id, round=1, attempt=2)
    assert await sums.refused("h01", good, attempt=replayed) == Code.NOT_FOUND
    assert await sums.refused("h01", good, ciphertext_sha256="zz") == Code.INVALID_ARGUMENT
    await sums.upload("h01", good)
    values = mesh.hospitals["h01"].values(1, 1)
    fresh = secret.encrypt(values, mesh.group_key, sums.form.lanes)
    assert await sums.refused("h01", fresh) == Code.ALREADY_CONTRIBUTED
    await sums.close(2)
    await sums.opened(["h01", "h02"])


async def test_a_sum_is_opened_with_one_content(mesh: Mesh) -> None:
    sums = Sums(mesh)
    await sums.open()
    for changes in (
        {"group": ["h01", "h02"]},
        {"form": round_pb2.SumForm(**_fields(sums.form) | {"vector_length": 5})},
    ):
        with pytest.raises(FedmeshError) as differs:
            await sums.open(**changes)
        assert differs.value.code is Code.ALREADY_EXISTS
    past = Timestamp(seconds=1)
    bad: list[dict[str, Any]] = [
        {"expires_at": past},
        {"group": ["h02", "h01"]},
        {"group": ["h01"]},
        {"group": [f"h{number:02d}" for number in range(17)]},
        {"form": round_pb2.SumForm(**_fields(sums.form) | {"parameter_set": "ckks"})},
        {"form": round_pb2.SumForm(**_fields(sums.form) | {"lanes": 3})},
        {"form": round_pb2.SumForm(**_fields(sums.form) | {"vector_length": 0})},
    ]
    for changes in bad:
        with pytest.raises(FedmeshError) as refused:
            await Sums(mesh).open(**changes)
        assert refused.value.code is Code.INVALID_ARGUMENT


def _fields(form: round_pb2.SumForm) -> dict[str, Any]:
    return {"parameter_set": form.parameter_set, "lanes": form.lanes, "vector_length": form.vector_length}


async def test_two_replicas_count_everyone_once_at_the_same_time(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=15, coordinators=0, aggregators=2) as mesh:
        sums = Sums(mesh)
        content = {name: await sums.ciphertext(name) for name in sums.group}
        await sums.open()
        # Everyone uploads to both replicas at once, as after a broken connection.
        answers = await asyncio.gather(
            *(sums.upload(name, content[name], replica=replica) for name in sums.group for replica in (0, 1))
        )
        assert sum(not answer.already_counted for answer in answers) == 15
        closed = await sums.close(15)
        assert len(closed.contributions) == 15
        await sums.opened(sums.group)
        assert mesh.registry.event_types().count("contribution.accepted") == 15


async def test_a_killed_replica_loses_and_doubles_nothing(tmp_path: Path, redis_server: RedisServer) -> None:
    async with running_mesh(tmp_path, redis_server, hospitals=8, coordinators=0) as mesh:
        sums = Sums(mesh)
        content = {name: await sums.ciphertext(name) for name in sums.group}
        await sums.open()
        uploads = [asyncio.create_task(mesh.hospitals[name].upload(sums.attempt, content[name])) for name in sums.group]
        await asyncio.wait(uploads, return_when=asyncio.FIRST_COMPLETED)
        await mesh.aggregators[0].stop(signal.SIGKILL)
        await mesh.aggregators[0].start()
        await asyncio.gather(*uploads)
        assert len((await sums.close(8)).contributions) == 8
        await sums.opened(sums.group)
        assert mesh.registry.event_types().count("contribution.accepted") == 8


async def test_events_are_made_up_for_while_the_registry_was_away(mesh: Mesh) -> None:
    sums = Sums(mesh, ["h01", "h02", "h03"])
    content = {name: await sums.ciphertext(name) for name in sums.group}
    await sums.open()
    mesh.registry.away = True
    for name in ("h01", "h02"):
        assert await sums.refused(name, content[name]) == Code.SERVICE_UNAVAILABLE
    # A strike is not lost either: the answer is "try again" until it is recorded.
    assert await sums.refused("h03", content["h03"][:-1]) == Code.SERVICE_UNAVAILABLE
    mesh.registry.away = False
    assert await sums.refused("h03", content["h03"][:-1]) == Code.CIPHERTEXT_INVALID
    assert sums.strikes() == ["hospital/h03"]
    assert (await sums.upload("h01", content["h01"])).already_counted
    assert mesh.registry.event_types().count("contribution.accepted") == 1
    await sums.close(2)
    assert mesh.registry.event_types().count("contribution.accepted") == 2


async def test_sums_are_forgotten_at_their_time(mesh: Mesh, redis_server: RedisServer) -> None:
    sums = Sums(mesh, ["h01", "h02"])
    expires_at = Timestamp()
    expires_at.FromDatetime(datetime.now(UTC) + timedelta(seconds=4))
    await sums.open(expires_at=expires_at)
    await sums.upload("h01", await sums.ciphertext("h01"))
    with redis_server.client() as admin:
        keys = list(admin.scan_iter("*"))
        assert len(keys) >= 2
        assert all(key.startswith(b"aggregator:") and admin.pttl(key) > 0 for key in keys)
        while list(admin.scan_iter("*")):  # noqa: ASYNC110 - Redis decides
            await asyncio.sleep(0.1)
    assert await sums.refused("h02", await sums.ciphertext("h02")) == Code.NOT_FOUND


async def test_access(mesh: Mesh) -> None:
    sums = Sums(mesh)
    for tls in (mesh.ca.issue_hospital("h01"), mesh.ca.issue_operator("olga"), mesh.ca.issue_service("registry")):
        async with MeshChannel(mesh.aggregators[0].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            with pytest.raises(FedmeshError) as refused:
                await call(stub.CloseSum, pb.CloseSumRequest(request_id=new_id(), attempt=sums.attempt))
            assert refused.value.code is Code.PERMISSION_DENIED
