"""Two replicas behind one name, as in a cluster; one falls silent with its connections open, as when it is frozen."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from loadtests.chaos.names import NameServer
from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import create_ca
from services.embedded.processes import free_port

NAME = "audit.silent.test"
HOSTS = ("127.78.0.1", "127.78.0.2")


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Says which replica it is. While it is frozen its calls come in, and get no answer."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.running = asyncio.Event()
        self.running.set()
        self.calls: Counter[str] = Counter()

    async def GetCheckpoint(self, _request: Any, _context: Any) -> Any:
        self.calls[caller().name] += 1
        await self.running.wait()
        return audit_pb2.GetCheckpointResponse(checkpoint=self.host)

    async def ListEntries(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        await self.running.wait()
        yield audit_pb2.ListEntriesResponse(index=1)


@dataclass
class Replicas:
    target: str
    audits: list[Audit]
    hospital: TlsConfig
    operator: TlsConfig

    async def ask(self, channel: MeshChannel, **options: Any) -> str:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        answer = await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest(), **options)
        return str(answer.checkpoint)


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    ca = create_ca(tmp_path / "ca", "test.local")
    tls, port, names_port = ca.issue_service("audit", dns=[NAME]), free_port(), free_port()
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    add = audit_pb2_grpc.add_AuditServiceServicer_to_server
    names, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer({NAME: HOSTS}), ("127.0.0.1", names_port)
    )
    audits = [Audit(host) for host in HOSTS]
    async with AsyncExitStack() as stack:
        stack.callback(names.close)
        for audit in audits:
            config = ServerConfig(listen=f"{audit.host}:{port}", tls=tls, drain_s=0)
            server = MeshServer(config, [Endpoint(descriptor, add, audit)])
            await server.start()
            stack.push_async_callback(server.stop)
        yield Replicas(
            f"dns://127.0.0.1:{names_port}/{NAME}:{port}", audits, ca.issue_hospital("h-1"), ca.issue_operator("olga")
        )
        for audit in audits:
            audit.running.set()


async def both(replicas: Replicas, channel: MeshChannel) -> None:
    """Call until both have answered: from then on the channel is connected to both."""
    seen: set[str] = set()
    async with asyncio.timeout(60):
        while len(seen) < len(HOSTS):
            seen.add(await replicas.ask(channel, patience_s=30))


async def test_calls_go_around_a_replica_that_falls_silent(replicas: Replicas) -> None:
    async with MeshChannel(replicas.target, replicas.hospital) as channel:
        await both(replicas, channel)
        frozen, awake = replicas.audits
        frozen.running.clear()
        before = frozen.calls.total()
        # No patience: without a second try, every other call would end by its deadline.
        assert [await replicas.ask(channel) for _ in range(10)] == [awake.host] * 10
        assert frozen.calls.total() > before
        frozen.running.set()
        await both(replicas, channel)


async def test_a_call_that_may_take_long_is_made_once(replicas: Replicas) -> None:
    """It is not for the client to say that a long computation takes too long."""
    async with (
        MeshChannel(replicas.target, replicas.hospital) as channel,
        MeshChannel(replicas.target, replicas.operator) as other,
    ):
        await both(replicas, channel)
        await both(replicas, other)
        for audit in replicas.audits:
            audit.running.clear()
            audit.calls.clear()
        asked = asyncio.ensure_future(replicas.ask(channel, timeout_s=60))
        with pytest.raises(FedmeshError) as caught:
            await replicas.ask(other, timeout_s=2)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        made = replicas.audits[0].calls + replicas.audits[1].calls
        # The ordinary call shows that there was time for second tries.
        assert made["olga"] > 1
        assert made["h-1"] == 1
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
