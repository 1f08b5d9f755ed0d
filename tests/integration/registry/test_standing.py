"""A suspended hospital is refused by other services within seconds: calls, and streams that are under way."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.common.config import ServerConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.grpc.server import Endpoint, MeshServer
from services.common.standing import Standing, StandingConfig, registry_members
from tests.integration.registry.harness import Registry, code, refused, striking

SECONDS = 30.0


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Heartbeats for ever; `closed` is set when a stream's end was heeded."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def ReportReady(self, _request: Any, _context: Any) -> Any:
        return coordinator_pb2.ReportReadyResponse()

    async def WatchTasks(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield coordinator_pb2.WatchTasksResponse()
                await asyncio.sleep(0.05)
        finally:
            self.closed.set()


class Aggregator(aggregator_pb2_grpc.AggregatorServiceServicer):
    async def Upload(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        async for _ in requests:
            pass
        return aggregator_pb2.UploadResponse()


class Mesh:
    """Two services beside a registry, each with its own view of standing."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.tls = registry.ca.issue_service("coordinator")
        self.channel = MeshChannel(f"127.0.0.1:{registry.server.port}", self.tls)
        self.standing = Standing(registry_members(self.channel), StandingConfig(interval_s=0.2))
        self.coordinator = Coordinator()
        self.server = MeshServer(
            ServerConfig(listen="127.0.0.1:0", tls=self.tls, drain_s=0),
            [
                Endpoint(
                    coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
                    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server,
                    self.coordinator,
                ),
                Endpoint(
                    aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"],
                    aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server,
                    Aggregator(),
                ),
            ],
            admit=self.standing.admit,
        )
        self.channels: list[MeshChannel] = [self.channel]

    def stub(self, hospital: str, make: Any = coordinator_pb2_grpc.CoordinatorServiceStub) -> Any:
        channel = MeshChannel(f"127.0.0.1:{self.server.port}", self.registry._tls("hospital", hospital))
        self.channels.append(channel)
        return channel.stub(make)

    async def ready(self, hospital: str) -> Any:
        return await call(self.stub(hospital).ReportReady, coordinator_pb2.ReportReadyRequest())

    async def admits(self, hospital: str) -> bool:
        try:
            await self.ready(hospital)
        except FedmeshError:
            return False
        return True

    async def refused(self, hospital: str) -> FedmeshError:
        """The refusal that comes within seconds."""

        async def barred() -> bool:
            return not await self.admits(hospital)

        await self.registry.settled(barred, SECONDS)
        return await refused(self.ready(hospital))


@pytest.fixture
async def mesh(registry: Registry, tmp_path: Path) -> AsyncIterator[Mesh]:
    await registry.register("north", "south")
    made = Mesh(registry)
    await made.server.start()
    yield made
    await made.server.stop()
    for channel in made.channels:
        await channel.close()


async def polled(mesh: Mesh) -> asyncio.Task[None]:
    await mesh.standing.refresh()
    return asyncio.create_task(mesh.standing.run())


async def test_a_suspension_ends_calls_and_streams_within_seconds(mesh: Mesh, registry: Registry) -> None:
    polling = await polled(mesh)
    await mesh.ready("north")
    watching = stream(mesh.stub("north").WatchTasks, coordinator_pb2.WatchTasksRequest())
    others = stream(mesh.stub("south").WatchTasks, coordinator_pb2.WatchTasksRequest())
    await anext(watching)
    await anext(others)
    going, ended = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[Any]:
        while not ended.is_set():
            yield aggregator_pb2.UploadRequest(chunk=b"x")
            going.set()
            await asyncio.sleep(0.05)

    uploading = asyncio.create_task(
        code(call(mesh.stub("north", aggregator_pb2_grpc.AggregatorServiceStub).Upload, slowly, timeout_s=60))
    )
    await going.wait()
    for _ in range(3):  # the limit of the harness
        await call(registry.service().RecordStrike, striking("north"))

    cut = await refused(asyncio.wait_for(_exhaust(watching), SECONDS))
    assert (cut.code, "suspended: ask the consortium" in cut.message) == (Code.PERMISSION_DENIED, True)
    await asyncio.wait_for(mesh.coordinator.closed.wait(), SECONDS)
    assert await asyncio.wait_for(uploading, SECONDS) is Code.PERMISSION_DENIED
    ended.set()
    assert (await mesh.refused("north")).code is Code.PERMISSION_DENIED
    # The active one notices nothing.
    await mesh.ready("south")
    await anext(others)

    await registry.decide("reinstate", "north")
    await registry.settled(lambda: mesh.admits("north"), SECONDS)
    await registry.decide("remove", "north")
    assert "removed" in (await mesh.refused("north")).message
    polling.cancel()


async def test_while_the_registry_is_away_the_last_list_stands(mesh: Mesh, registry: Registry) -> None:
    assert (await mesh.refused("south")).code is Code.SERVICE_UNAVAILABLE  # no list yet
    await registry.suspend("north")
    polling = await polled(mesh)
    await asyncio.to_thread(registry.database.stop)
    await asyncio.sleep(0.5)
    assert await mesh.admits("south")
    assert await code(mesh.ready("north")) is Code.PERMISSION_DENIED
    await asyncio.to_thread(registry.database.start)
    await registry.decide("reinstate", "north")
    await registry.settled(lambda: mesh.admits("north"), SECONDS)
    assert not polling.done()
    polling.cancel()


async def _exhaust(messages: AsyncIterator[Any]) -> None:
    async for _ in messages:
        pass
