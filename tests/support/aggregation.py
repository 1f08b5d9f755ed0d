"""Hospitals with real keys, statements and ciphertexts around real aggregator processes, and a registry in memory."""

import asyncio
import hashlib
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from fedmesh.aggregator.v1 import aggregator_pb2 as pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as rpc
from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.grpc.client import PART_BYTES, MeshChannel, call, chunks, stream
from services.common.ids import new_id
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port
from services.secure_sum import masks, opening, public, secret
from services.secure_sum.encoding import Int64Vector
from services.secure_sum.encryption import PublicEncryptor
from services.secure_sum.opening import Opening
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.statements import AttemptRef, Signed, adverts_digest
from services.secure_sum.wire import Layout, layout_of
from tests.support.fake_registry import FakeRegistry
from tests.support.secure_sum import Consortium, sum_segments
from tests.support.service_process import ServiceProcess
from tests.support.stores import RedisServer

GROUP_KEY = secret.generate_group_key()
PUBLIC_KEY = secret.make_public_key(GROUP_KEY)


@dataclass
class Centre:
    """Running aggregators and what is around them."""

    ca: CertificateAuthority
    registry: FakeRegistry
    aggregators: list[ServiceProcess]
    metrics: str
    """Address of the first aggregator's page of metrics."""

    def strikes(self) -> list[tuple[str, str]]:
        """Who was struck, and why."""
        return [(item.hospital_id, item.code) for item in self.registry.strikes.values()]

    async def uploading(self, number: int) -> None:
        """Wait until so many uploads are being received."""
        async with asyncio.timeout(120):
            expected = f"\nfedmesh_aggregator_uploads_in_flight {number:.1f}\n"
            while expected not in await asyncio.to_thread(self._page):  # noqa: ASYNC110 - the aggregator decides
                await asyncio.sleep(0.02)

    def _page(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as page:
            return str(page.read().decode())

    async def ask(self, tls: Any, method: str, request: Any, *, replica: int = 0) -> Any:
        async with MeshChannel(self.aggregators[replica].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            return await call(getattr(stub, method), request, timeout_s=120)


@asynccontextmanager
async def running_centre(
    folder: Path, redis_server: RedisServer, *, aggregators: int = 1, **sections: Any
) -> AsyncIterator[Centre]:
    """sections: parts of the aggregators' configuration that differ from the defaults."""
    ca = create_ca(folder / "ca", "testmesh")
    registry = FakeRegistry()
    config = {
        "redis": redis_server.config("aggregator").model_dump(mode="json"),
        "registry": {"target": await registry.start(ca.issue_service("registry"))},
    }
    tls = ca.issue_service("aggregator").model_dump(mode="json")
    pages = [f"127.0.0.1:{free_port()}" for _ in range(aggregators)]
    processes = [
        ServiceProcess(
            "aggregator",
            {**config, **sections, "server": {"tls": tls, "drain_s": 1, "metrics_listen": page}},
            folder,
        )
        for page in pages
    ]
    try:
        await asyncio.gather(*(process.start() for process in processes))
        yield Centre(ca, registry, processes, pages[0])
    finally:
        codes = await asyncio.gather(*(process.stop() for process in processes if process.started))
        await registry.stop()
        assert set(codes) <= {0, -signal.SIGKILL}, [line for process in processes for line in process.log]


@dataclass
class Upload:
    """What a hospital sends: its signed statement and its segments."""

    signed: Signed
    segments: list[bytes]

    @property
    def content(self) -> bytes:
        return b"".join(self.segments)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Attempt:
    """One attempt of a consortium, up to the uploads; the coordinator's calls and the hospitals'."""

    centre: Centre
    consortium: Consortium
    layout: Layout
    sharers: list[str]
    ids: round_pb2.Attempt
    values: dict[str, Int64Vector] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        centre: Centre,
        members: int,
        vector_length: int = 300,
        lanes: int = 2,
        sharers: int | None = None,
        parameters: str = DEFAULT.name,
    ) -> "Attempt":
        """All of `members`, or the first `sharers` of them, have shared; nobody has uploaded."""
        made = Consortium.of(members)
        made.attempt = AttemptRef(job_id=new_id(), round=1, attempt=1)
        made.begin(list(made.keys))
        made.share()
        shared = sorted(made.keys)[:sharers]
        made.receive(shared)
        ids = round_pb2.Attempt(job_id=made.attempt.job_id, round=1, attempt=1)
        return cls(centre, made, layout_of(parameters, vector_length, lanes), shared, ids)

    # ---- hospitals

    def upload_of(self, name: str) -> Upload:
        """The hospital's upload, the same at every call."""
        if name not in self.uploads:
            self.uploads[name] = self._make(name)
        return self.uploads[name]

    def _make(self, name: str) -> Upload:
        layout, member = self.layout, self.consortium.member(name)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        values = np.random.default_rng(seed).integers(-1000, 1000, layout.vector_length, dtype=np.int64)
        self.values[name] = values
        plan = member.mask_plan(self.consortium.states[name])
        encryptor = PublicEncryptor(PUBLIC_KEY) if layout.params.public_key else secret.SecretEncryptor(GROUP_KEY)
        segments = [
            public.add_masked(
                layout, index, zeros, values[slice(at, at + count)], masks.of_segment(plan, layout, index)
            )
            for index, zeros in enumerate(encryptor.zeros(layout))
            for at, count in [layout.values(index)]
        ]
        state = member.commit(
            self.consortium.states[name],
            layout.params.name,
            layout.lanes,
            layout.vector_length,
            hashlib.sha256(b"".join(segments)).hexdigest(),
            [hashlib.sha256(segment).hexdigest() for segment in segments],
        )
        self.consortium.states[name] = state
        self.consortium.masked[name] = np.zeros(0, dtype=np.uint64)
        assert state.upload is not None
        return Upload(state.upload, segments)

    async def send(
        self,
        name: str,
        made: Upload | None = None,
        *,
        replica: int = 0,
        pause_s: float = 0.0,
        part_bytes: int = PART_BYTES,
        **changes: Any,
    ) -> pb.UploadResponse:
        """Upload with a header that is right, but for `changes`. pause_s: before each segment."""
        sent = made or self.upload_of(name)
        fields: dict[str, Any] = {
            "request_id": new_id(),
            "attempt": self.ids,
            "form": self.form(),
            "size_bytes": self.layout.upload_bytes,
            "ciphertext_sha256": sent.sha256,
            "upload": signed(sent.signed),
        }

        async def messages() -> AsyncIterator[pb.UploadRequest]:
            yield pb.UploadRequest(header=pb.UploadHeader(**(fields | changes)))
            for segment in sent.segments:
                await asyncio.sleep(pause_s)
                *beginning, rest = list(chunks(segment, part_bytes)) or [b""]
                for part in beginning:
                    yield pb.UploadRequest(beginning=part)
                yield pb.UploadRequest(chunk=rest)

        tls = self.centre.ca.issue_hospital(name)
        answer: pb.UploadResponse = await self.centre.ask(tls, "Upload", messages, replica=replica)
        return answer

    async def send_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.upload_of(name)
            await self.send(name)

    async def download(self, name: str, replica: int = 0) -> list[bytes]:
        tls = self.centre.ca.issue_hospital(name)
        async with MeshChannel(self.centre.aggregators[replica].target, tls) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            request = pb.DownloadSumRequest(attempt=self.ids)
            content = b"".join([part.chunk async for part in stream(stub.DownloadSum, request, timeout_s=120)])
        return sum_segments(self.layout, content)

    async def segments(self, caller: str, index: int, *, in_parts: bool = True) -> dict[str, bytes]:
        """The segment of every upload but the caller's own, by hospital."""
        async with MeshChannel(self.centre.aggregators[0].target, self.centre.ca.issue_hospital(caller)) as channel:
            stub = channel.stub(rpc.AggregatorServiceStub)
            request = pb.GetSegmentsRequest(attempt=self.ids, index=index, in_parts=in_parts)
            answers = [answer async for answer in stream(stub.GetSegments, request, timeout_s=120)]
        found: dict[str, bytes] = {}
        for item in (item for answer in answers for item in answer.segments):
            assert in_parts or item.hospital_id not in found
            assert not in_parts or len(item.segment) <= PART_BYTES
            found[item.hospital_id] = found.get(item.hospital_id, b"") + item.segment
        return found

    async def opened(self, survivors: Iterable[str], replica: int = 0) -> list[bytes]:
        """The downloaded sum, after checking that it decrypts to the sum of the survivors' values."""
        names = list(survivors)
        total = await self.download(names[0], replica)
        plain = secret.decrypt_segments(total, GROUP_KEY, self.layout)
        assert np.array_equal(plain, sum(self.values[name] for name in names))
        return total

    # ---- the coordinator

    def form(self) -> round_pb2.SumForm:
        return round_pb2.SumForm(
            parameter_set=self.layout.params.name, lanes=self.layout.lanes, vector_length=self.layout.vector_length
        )

    async def coordinate(self, method: str, request: Any, replica: int = 0) -> Any:
        return await self.centre.ask(self.centre.ca.issue_service("coordinator"), method, request, replica=replica)

    async def open(self, lifetime_s: float = 300.0, **changes: Any) -> int:
        expires_at = Timestamp()
        expires_at.FromDatetime(datetime.now(UTC) + timedelta(seconds=lifetime_s))
        keys = self.consortium.roster
        fields: dict[str, Any] = {
            "attempt": self.ids,
            "form": self.form(),
            "group": self.sharers,
            "signers": [pb.SignerKey(hospital_id=name, signing_key=keys.signing_key(name)) for name in self.sharers],
            "adverts_sha256": adverts_digest(self.consortium.adverts),
            "expires_at": expires_at,
        }
        request = pb.OpenSumRequest(request_id=new_id(), **(fields | changes))
        return int((await self.coordinate("OpenSum", request)).upload_bytes)

    async def close(self, minimum: int = 1) -> pb.CloseSumResponse:
        request = pb.CloseSumRequest(request_id=new_id(), attempt=self.ids, minimum_contributors=minimum)
        answer: pb.CloseSumResponse = await self.coordinate("CloseSum", request)
        return answer

    async def get(self) -> pb.GetSumResponse:
        answer: pb.GetSumResponse = await self.coordinate("GetSum", pb.GetSumRequest(attempt=self.ids))
        return answer

    async def discard(self) -> None:
        await self.coordinate("DiscardSum", pb.DiscardSumRequest(request_id=new_id(), attempt=self.ids))

    def unmask(self) -> Opening:
        """Confirm and reveal; those who made an upload are the survivors."""
        confirmations = self.consortium.confirm()
        reveals = self.consortium.reveal(sorted(self.uploads), confirmations)
        made = self.consortium
        return opening.open_masks(made.roster, made.survivors, made.adverts, reveals)

    async def compute(
        self, survivors: Sequence[str], opened: Opening, replica: int = 0, **changes: Any
    ) -> pb.ComputeSumResponse:
        keys = opening.mask_keys(self.consortium.adverts, self.consortium.roster, self.sharers)
        fields: dict[str, Any] = {
            "attempt": self.ids,
            "survivors": survivors,
            "mask_keys": [pb.MaskKey(**known.__dict__) for known in keys],
            "opening": round_pb2.Opening(self_seeds=_seeds(opened.self_seeds), mask_seeds=_seeds(opened.mask_seeds)),
        }
        request = pb.ComputeSumRequest(request_id=new_id(), **(fields | changes))
        answer: pb.ComputeSumResponse = await self.coordinate("ComputeSum", request, replica)
        return answer


def signed(statement: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(
        hospital_id=statement.hospital_id, statement=statement.statement, signature=statement.signature
    )


def _seeds(seeds: Any) -> list[round_pb2.OpenedSeed]:
    return [round_pb2.OpenedSeed(hospital_id=name, seed=seeds[name]) for name in sorted(seeds)]
