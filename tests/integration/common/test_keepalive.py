"""Idle channels: the client's pings keep them, and the server lets it ping."""

import asyncio
from pathlib import Path

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.common.config import ServerConfig
from services.common.grpc.client import MeshChannel
from services.common.grpc.keepalive import INTERVAL_MS, client_keepalive, server_keepalive
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import create_ca
from services.embedded.processes import free_port

QUICK_MS = 200
# gRPC hangs up at the third strike; this many intervals are far beyond it.
INTERVALS = 20


async def changes_while_idle(channel: grpc.aio.Channel, seconds: float) -> list[grpc.ChannelConnectivity]:
    """What becomes of a connected channel that nobody uses: the states after READY within some seconds."""
    await asyncio.wait_for(channel.channel_ready(), 20)
    seen = [channel.get_state()]
    try:
        async with asyncio.timeout(seconds):
            while seen[-1] is not grpc.ChannelConnectivity.IDLE:
                await channel.wait_for_state_change(seen[-1])
                seen.append(channel.get_state())
    except TimeoutError:
        pass
    return seen[1:]


async def idle(server_options: list[tuple[str, int]], seconds: float) -> list[grpc.ChannelConnectivity]:
    server = grpc.aio.server(options=server_options)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=client_keepalive(QUICK_MS)) as channel:
            return await changes_while_idle(channel, seconds)
    finally:
        await server.stop(0)


async def test_an_idle_channel_stays_connected() -> None:
    assert await idle(server_keepalive(QUICK_MS), INTERVALS * QUICK_MS / 1000) == []


async def test_a_server_without_these_options_hangs_up_on_the_same_client() -> None:
    """The test above would pass without a single ping; this one shows that they are sent."""
    pings_allowed_at_all = [("grpc.keepalive_permit_without_calls", 1)]
    assert await idle(pings_allowed_at_all, 60) == [grpc.ChannelConnectivity.IDLE]


@pytest.mark.slow
async def test_an_idle_channel_of_the_mesh_stays_connected(tmp_path: Path) -> None:
    ca = create_ca(tmp_path / "ca", "test.local")
    config = ServerConfig(listen=f"127.0.0.1:{free_port()}", tls=ca.issue_service("audit"), drain_s=0)
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    endpoint = Endpoint(
        descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, audit_pb2_grpc.AuditServiceServicer()
    )
    server = MeshServer(config, [endpoint])
    await server.start()
    try:
        async with MeshChannel(config.listen, ca.issue_hospital("h-1")) as channel:
            assert await changes_while_idle(channel._current(), 5.5 * INTERVAL_MS / 1000) == []
    finally:
        await server.stop()
