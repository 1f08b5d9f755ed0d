"""Clients that connect and do not speak, or a byte at a time, that open streams without end, that send too much."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from prometheus_client import REGISTRY

from services.common.config import LimitsConfig, ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port

CALLS, CALLS_OF_ONE, METADATA_BYTES = 6, 4, 8192


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Holds calls as long as the test wants."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.held = asyncio.Semaphore(0)
        self.at_once = 0
        self.most = 0

    async def GetCheckpoint(self, _request: Any, _context: Any) -> Any:
        return audit_pb2.GetCheckpointResponse()

    async def GetOfferedCheckpoint(self, _request: Any, _context: Any) -> Any:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.held.release()
        try:
            await self.release.wait()
        finally:
            self.at_once -= 1
        return audit_pb2.GetOfferedCheckpointResponse()

    async def wait_for(self, calls: int) -> None:
        """Until so many more calls are in hand."""
        for _ in range(calls):
            await self.held.acquire()


class Setup:
    def __init__(self, folder: Path) -> None:
        self.ca: CertificateAuthority = create_ca(folder / "ca", "test.local")
        self.hospital = self.ca.issue_hospital("h-1")
        self.audit = Audit()
        self.port = free_port()
        self.stopping: list[MeshServer] = []

    def serve(self, **limits: Any) -> MeshServer:
        given = {"calls": CALLS, "calls_of_one": CALLS_OF_ONE, "metadata_bytes": METADATA_BYTES, "handshake_s": 1}
        config = ServerConfig(
            listen=f"127.0.0.1:{self.port}",
            tls=self.ca.issue_service("audit"),
            drain_s=1,
            limits=LimitsConfig(**(given | limits)),
        )
        descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
        return MeshServer(config, [Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, self.audit)])

    def channel(self, tls: TlsConfig) -> MeshChannel:
        return MeshChannel(f"127.0.0.1:{self.port}", tls)

    async def still_answers(self) -> None:
        async with self.channel(self.ca.issue_hospital("h-9")) as channel:
            await call(channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint, audit_pb2.GetCheckpointRequest())

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.hospital.ca))
        context.load_cert_chain(self.hospital.certificate, self.hospital.key)
        context.set_alpn_protocols(["h2"])
        return context


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.audit.release.set()
    for server in made.stopping:
        await server.stop()


@pytest.fixture
async def served(setup: Setup) -> Setup:
    server = setup.serve()
    setup.stopping.append(server)
    await server.start()
    return setup


def hold(channel: MeshChannel) -> "asyncio.Task[Any]":
    stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
    request = audit_pb2.GetOfferedCheckpointRequest()
    return asyncio.create_task(call(stub.GetOfferedCheckpoint, request, timeout_s=60))


def shed(bound: str) -> float:
    return REGISTRY.get_sample_value("fedmesh_grpc_server_shed_total", {"bound": bound}) or 0.0


async def closed(reader: asyncio.StreamReader) -> None:
    """Read until the server hangs up; fails when it does not."""
    async with asyncio.timeout(30):
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            return


async def test_a_connection_that_says_nothing_is_hung_up_on(served: Setup) -> None:
    opened = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(50)]
    await served.still_answers()
    await asyncio.gather(*(closed(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.close()


async def test_a_byte_now_and_then_does_not_keep_a_handshake_open(served: Setup) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)

    async def drip() -> None:
        # The beginning of a TLS record that announces more than ever comes.
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(1000):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    await closed(reader)
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    writer.close()


async def test_tls_without_http2_after_it_is_hung_up_on(served: Setup) -> None:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", served.port, ssl=served.tls(), server_hostname="localhost"
    )
    await closed(reader)
    writer.close()


async def test_one_caller_cannot_fill_the_server(served: Setup) -> None:
    before = shed("caller")
    async with served.channel(served.hospital) as channel:
        held = [hold(channel) for _ in range(CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS_OF_ONE)
        with pytest.raises(FedmeshError, match="4 calls of h-1 are in flight") as caught:
            await hold(channel)
        assert caught.value.code is Code.RATE_LIMITED
        assert shed("caller") == before + 1
        await served.still_answers()
        served.audit.release.set()
        await asyncio.gather(*held)
        # What has ended counts no longer.
        await hold(channel)


async def test_a_full_server_says_so_and_recovers(served: Setup) -> None:
    before = shed("server")
    async with served.channel(served.hospital) as one, served.channel(served.ca.issue_hospital("h-2")) as two:
        held = [hold(one) for _ in range(CALLS_OF_ONE)] + [hold(two) for _ in range(CALLS - CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS)
        with pytest.raises(FedmeshError, match="too many calls are in flight here") as caught:
            await served.still_answers()
        assert caught.value.code is Code.SERVICE_UNAVAILABLE
        assert caught.value.retryable
        assert shed("server") > before
        served.audit.release.set()
        await asyncio.gather(*held)
        await served.still_answers()


async def test_a_cancelled_call_makes_room(served: Setup) -> None:
    async with served.channel(served.hospital) as channel:
        held = [hold(channel) for _ in range(CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS_OF_ONE)
        held[0].cancel()
        await asyncio.gather(held[0], return_exceptions=True)
        async with asyncio.timeout(30):
            while served.audit.at_once == CALLS_OF_ONE:  # noqa: ASYNC110 - the cancellation travels
                await asyncio.sleep(0.01)
        held[0] = hold(channel)
        await served.audit.wait_for(1)
        served.audit.release.set()
        await asyncio.gather(*held)


async def test_metadata_over_the_limit_never_reaches_a_handler(served: Setup) -> None:
    tls = served.hospital
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{served.port}", credentials) as channel:
        ask: Any = audit_pb2_grpc.AuditServiceStub(channel).GetCheckpoint
        request = audit_pb2.GetCheckpointRequest()
        await ask(request, timeout=20, metadata=(("x-fits", "a" * (METADATA_BYTES // 2)),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(request, timeout=20, metadata=(("x-too-much", "a" * METADATA_BYTES),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await served.still_answers()
