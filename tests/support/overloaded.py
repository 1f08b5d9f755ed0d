"""A server with small limits, whose calls last as long as a test wants."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from prometheus_client import REGISTRY

from services.common.config import LimitsConfig, ServerConfig, TlsConfig
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import Admit
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

    async def start(self, admit: Admit | None = None, **limits: Any) -> None:
        """Serve with the small limits above, but for those that are given, until the test ends."""
        given = {"calls": CALLS, "calls_of_one": CALLS_OF_ONE, "metadata_bytes": METADATA_BYTES, "handshake_s": 1}
        config = ServerConfig(
            listen=f"127.0.0.1:{self.port}",
            tls=self.ca.issue_service("audit"),
            drain_s=1,
            limits=LimitsConfig(**(given | limits)),
        )
        descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
        endpoint = Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, self.audit)
        server = MeshServer(config, [endpoint], admit=admit)
        self.stopping.append(server)
        await server.start()

    def channel(self, tls: TlsConfig) -> MeshChannel:
        return MeshChannel(f"127.0.0.1:{self.port}", tls)

    async def still_answers(self) -> None:
        async with self.channel(self.ca.issue_hospital("h-9")) as channel:
            await call(channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint, audit_pb2.GetCheckpointRequest())

    async def lets_in(self, tls: TlsConfig) -> None:
        """Until the server answers this caller, who had too many calls or connections: their end travels."""
        async with asyncio.timeout(60), self.channel(tls) as channel:
            ask = channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint
            await call(ask, audit_pb2.GetCheckpointRequest(), patience_s=60)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of the hospital that has TLS, and no HTTP/2 yet."""
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls(), server_hostname="localhost")

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.hospital.ca))
        context.load_cert_chain(self.hospital.certificate, self.hospital.key)
        context.set_alpn_protocols(["h2"])
        return context


def hold(channel: MeshChannel) -> "asyncio.Task[Any]":
    stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
    request = audit_pb2.GetOfferedCheckpointRequest()
    return asyncio.create_task(call(stub.GetOfferedCheckpoint, request, timeout_s=60))


def shed(bound: str) -> float:
    return REGISTRY.get_sample_value("fedmesh_grpc_server_shed_total", {"bound": bound}) or 0.0
