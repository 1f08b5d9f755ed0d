"""Composition of the aggregator process."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from redis.asyncio import Redis

from services.aggregator import adding, metrics
from services.aggregator.computing import Computer
from services.aggregator.config import AggregatorConfig
from services.aggregator.domain.events import Event
from services.aggregator.ports import ChunkStore
from services.aggregator.receiving import Receiver, Streams
from services.aggregator.registry import RegistryClient
from services.aggregator.servicer import AggregatorServicer
from services.aggregator.store.chunks import DirectoryChunks, RedisChunks
from services.aggregator.store.records import RedisSums
from services.aggregator.usecases import AggregatorUseCases, Parts
from services.common.clock import SystemClock
from services.common.config import read_secret
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import Endpoint, run_server
from services.common.redis import connect_redis, redis_ready
from services.common.redis_master import follow_master
from services.common.redis_watch import RedisWatch
from services.common.refusal_spool import open_spool
from services.common.refusals import RefusalEvent, RefusalLog
from services.common.standing import Standing, registry_members
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.secure_sum.disposable import DisposablePool


def check(config: AggregatorConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates, an unreadable password file, or a directory of
        chunks that is not there.
    """
    load_tls(config.server.tls)
    if config.redis.password_file is not None:
        read_secret(config.redis.password_file)
    directory = config.chunks.directory
    if directory is not None and not directory.is_dir():
        raise FedmeshError(Code.CONFIG_INVALID, f"chunks.directory: {directory} is no folder: create it, mode 0700")


async def main(config: AggregatorConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID); (SERVICE_UNAVAILABLE) when no worker process can be started.
    """
    setup_telemetry("aggregator", config.telemetry)
    redis = connect_redis(config.redis)
    identity = load_tls(config.server.tls).identity
    chunks, background = _chunks(config, redis)
    pool = DisposablePool(config.computing.workers, config.computing.timeout_s, preload=(adding.MODULE,))

    async def ready() -> bool:
        return await redis_ready(redis) and await chunks.ready()

    try:
        async with pool, MeshChannel(config.registry.target, config.server.tls) as registry:
            await pool.warm()
            metrics.WAITING.set_function(lambda: pool.waiting)
            store = RedisSums(redis)
            client = RegistryClient(registry)
            computer = Computer(store, chunks, pool, config.computing.workers)
            parts = Parts(
                store,
                chunks,
                Receiver(chunks, pool),
                Streams(config.uploads.max_concurrent, config.uploads.idle_s),
                computer,
                client,
                SystemClock(),
            )

            async def tell(refused: Sequence[RefusalEvent]) -> None:
                await client.record([Event(*astuple(item)) for item in refused])

            usecases = AggregatorUseCases(parts, identity.consortium)
            standing = Standing(registry_members(registry), config.standing)
            background += [standing.run, RedisWatch(redis).run, lambda: follow_master(redis)]
            try:
                await run_server(
                    config.server,
                    [endpoint(usecases)],
                    background=background,
                    dependencies=ready,
                    admit=standing.admit,
                    refusals=RefusalLog(identity, tell, SystemClock(), spool=open_spool(config.server.refusals)),
                )
            finally:
                await computer.close()
    finally:
        await redis.aclose()
        shutdown_telemetry()


def _chunks(config: AggregatorConfig, redis: Redis) -> tuple[ChunkStore, list[Callable[[], Awaitable[None]]]]:
    """The store of chunks, and what it does in the background."""
    if config.chunks.directory is None:
        return RedisChunks(redis), []
    chunks = DirectoryChunks(config.chunks.directory, SystemClock())
    return chunks, [lambda: chunks.sweep_forever(config.chunks.sweep_s)]


def endpoint(usecases: AggregatorUseCases) -> Endpoint:
    """The gRPC service over the use cases."""
    return Endpoint(
        aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"],
        aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server,
        AggregatorServicer(usecases),
    )
