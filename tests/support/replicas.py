"""Replicas of one service behind one name, as in a cluster, each behind a network that may be cut."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from loadtests.chaos.names import NameServer
from loadtests.chaos.proxy import Connection, Proxy
from loadtests.chaos.rules import Line
from services.common.config import ServerConfig
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port

NAME = "audit.silent.test"


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Says which replica it is; a network that may be cut is before it."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.line = Line()
        self.proxy: Proxy | None = None
        self.running = asyncio.Event()
        self.running.set()
        self.calls: Counter[str] = Counter()

    async def GetCheckpoint(self, _request: Any, _context: Any) -> Any:
        self.calls[caller().name] += 1
        await self.running.wait()
        return audit_pb2.GetCheckpointResponse(checkpoint=self.host)

    def cut(self, cut: bool) -> None:
        """All its connections, and new ones, are open and silent."""
        assert self.proxy is not None
        self.line = Line(cut=cut)
        self.proxy.refresh()


def look(audit: Audit, _connection: Connection, _target: str) -> Line:
    return audit.line


@dataclass
class Replicas:
    target: str
    audits: list[Audit]
    ca: CertificateAuthority

    async def ask(self, channel: MeshChannel, **options: Any) -> str:
        """The host that answered a small call."""
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        answer = await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest(), **options)
        return str(answer.checkpoint)

    async def all_answer(self, channel: MeshChannel) -> None:
        """Call until every replica has answered: from then on the channel is connected to all of them."""
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while len(seen) < len(self.audits):
                seen.add(await self.ask(channel, patience_s=30))


@asynccontextmanager
async def running_replicas(folder: Path, count: int) -> AsyncIterator[Replicas]:
    """Start them, and end them."""
    ca = create_ca(folder / "ca", "test.local")
    tls, port, names_port = ca.issue_service("audit", dns=[NAME]), free_port(), free_port()
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    add = audit_pb2_grpc.add_AuditServiceServicer_to_server
    audits = [Audit(f"127.78.0.{number}") for number in range(1, count + 1)]
    names, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer({NAME: [audit.host for audit in audits]}), ("127.0.0.1", names_port)
    )
    async with AsyncExitStack() as stack:
        stack.callback(names.close)
        for audit in audits:
            config = ServerConfig(listen="127.0.0.1:0", tls=tls, drain_s=0)
            server = MeshServer(config, [Endpoint(descriptor, add, audit)])
            await server.start()
            stack.push_async_callback(server.stop)
            audit.proxy = Proxy(audit.host, ("127.0.0.1", server.port), partial(look, audit))
            await audit.proxy.start(audit.host, port)
            stack.push_async_callback(audit.proxy.stop)
        yield Replicas(f"dns://127.0.0.1:{names_port}/{NAME}:{port}", audits, ca)
        for audit in audits:
            audit.running.set()
