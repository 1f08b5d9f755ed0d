"""The plaintext health listener for probes: grpc.health.v1 and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.errors import Code, FedmeshError

# The service name that means "connected to the coordinator"; the empty name means "this process lives".
CONNECTED_SERVICE: Final = "fedmesh.hospital_node.connected"
_INTERVAL_S: Final = 1.0


@asynccontextmanager
async def health_probe(address: str | None, connected: Callable[[], bool]) -> AsyncIterator[None]:
    """Answer health checks at `address` meanwhile; nothing without an address.

    Raises: FedmeshError(CONFIG_INVALID) when the address cannot be bound.
    """
    if address is None:
        yield
        return
    servicer = health.aio.HealthServicer()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot listen on {address} for health checks") from error
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    follower = asyncio.ensure_future(_follow(servicer, connected))
    try:
        yield
    finally:
        follower.cancel()
        await server.stop(0)


async def _follow(servicer: health.aio.HealthServicer, connected: Callable[[], bool]) -> None:
    while True:
        answer = health_pb2.HealthCheckResponse
        await servicer.set(CONNECTED_SERVICE, answer.SERVING if connected() else answer.NOT_SERVING)
        await asyncio.sleep(_INTERVAL_S)
