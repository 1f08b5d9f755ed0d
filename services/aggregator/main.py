"""Composition of the aggregator process."""

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc

from services.aggregator.combiner import Combiner
from services.aggregator.config import AggregatorConfig
from services.aggregator.registry import RegistryEvents
from services.aggregator.servicer import AggregatorServicer
from services.aggregator.store.redis import RedisSums
from services.aggregator.usecases import AggregatorUseCases
from services.common.clock import SystemClock
from services.common.config import read_secret
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import Endpoint, run_server
from services.common.redis import connect_redis, redis_ready
from services.common.standing import Standing
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.secure_sum.disposable import DisposablePool


def check(config: AggregatorConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates or an unreadable password file.
    """
    load_tls(config.server.tls)
    if config.redis.password_file is not None:
        read_secret(config.redis.password_file)


async def main(config: AggregatorConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID); (SERVICE_UNAVAILABLE) when no worker process can be started.
    """
    setup_telemetry("aggregator", config.telemetry)
    redis = connect_redis(config.redis)
    pool = DisposablePool(config.adding.workers, config.adding.timeout_s, preload=("services.aggregator.addition",))
    try:
        async with pool, MeshChannel(config.registry.target, config.server.tls) as registry:
            await pool.warm()
            store = RedisSums(redis)
            usecases = AggregatorUseCases(
                store,
                Combiner(store, pool, config.adding.batch),
                RegistryEvents(registry),
                SystemClock(),
                consortium=load_tls(config.server.tls).identity.consortium,
                max_uploads=config.uploads.max_concurrent,
                idle_s=config.uploads.idle_s,
            )
            standing = Standing(registry, config.standing)
            await run_server(
                config.server,
                [endpoint(usecases)],
                background=[standing.run],
                dependencies=lambda: redis_ready(redis),
                admit=standing.admit,
            )
    finally:
        await redis.aclose()
        shutdown_telemetry()


def endpoint(usecases: AggregatorUseCases) -> Endpoint:
    """The gRPC service over the use cases."""
    return Endpoint(
        aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"],
        aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server,
        AggregatorServicer(usecases),
    )
