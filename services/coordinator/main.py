"""Composition of the coordinator process."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple

from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.common.clock import SystemClock
from services.common.config import read_secret
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import MAX_RECORD_BYTES, Endpoint, run_server
from services.common.redis import connect_redis, redis_ready
from services.common.redis_master import follow_master
from services.common.redis_watch import RedisWatch
from services.common.refusal_spool import open_spool
from services.common.refusals import RefusalEvent, RefusalLog
from services.common.standing import Standing, registry_members
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.coordinator.config import CoordinatorConfig
from services.coordinator.domain.events import Event
from services.coordinator.driver import Driver
from services.coordinator.hub import Hub
from services.coordinator.intake import Intake
from services.coordinator.ops import OpsPage, Overview
from services.coordinator.outward import Aggregator, Registry
from services.coordinator.rosters import Rosters
from services.coordinator.runner import JobRunner
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.store.redis import RedisRounds
from services.coordinator.tenure import Parts, Settings
from services.coordinator.usecases import CoordinatorUseCases, RateLimit


def check(config: CoordinatorConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates or an unreadable password file.
    """
    load_tls(config.server.tls)
    if config.redis.password_file is not None:
        read_secret(config.redis.password_file)


async def main(config: CoordinatorConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    setup_telemetry("coordinator", config.telemetry)
    tls = config.server.tls
    identity = load_tls(tls).identity
    clock = SystemClock()
    redis = connect_redis(config.redis)
    try:
        async with (
            MeshChannel(config.registry.target, tls, max_message_bytes=MAX_RECORD_BYTES) as to_registry,
            MeshChannel(config.aggregator.target, tls) as to_aggregator,
        ):
            store = RedisRounds(redis, lease_ms=int(config.driver.lease_s * 1000))
            standing = Standing(registry_members(to_registry), config.standing)
            registry = Registry(to_registry, config.driver.call_timeout_s)
            aggregator = Aggregator(to_aggregator, config.driver.call_timeout_s)

            async def tell(refused: Sequence[RefusalEvent]) -> None:
                await registry.record([Event(*astuple(item)) for item in refused])

            rosters = Rosters(registry)
            parts = Parts(
                store, registry, aggregator, rosters, clock, _settings(config, str(identity)), standing.barred
            )
            driver = Driver(store, registry, lambda job_id: JobRunner(job_id, parts), poll_s=config.driver.job_poll_s)
            hub = Hub(
                store,
                clock,
                heartbeat_s=config.tasks.heartbeat_s,
                presence_s=config.tasks.presence_s,
                wake=driver.wake,
            )
            rate = RateLimit(config.rate.per_second, config.rate.burst)
            intake = Intake(store, rosters)
            consortium = identity.consortium
            usecases = CoordinatorUseCases(store, hub, intake, registry, clock, consortium=consortium, rate=rate)
            background: list[Callable[[], Awaitable[None]]] = [
                hub.run,
                driver.run,
                standing.run,
                RedisWatch(redis).run,
                lambda: follow_master(redis),
            ]
            if config.ops_listen is not None:
                background.append(OpsPage(config.ops_listen, Overview(store, registry, clock)).run)
            await run_server(
                config.server,
                [endpoint(usecases)],
                background=background,
                admit=standing.admit,
                refusals=RefusalLog(identity, tell, clock, spool=open_spool(config.server.refusals)),
                dependencies=lambda: redis_ready(redis),
            )
    finally:
        await redis.aclose()
        shutdown_telemetry()


def _settings(config: CoordinatorConfig, actor: str) -> Settings:
    return Settings(
        actor=actor,
        lease_s=config.driver.lease_s,
        absence_grace_s=config.rounds.absence_grace_s,
        answer_grace_s=config.rounds.answer_grace_s,
        max_attempts=config.rounds.max_attempts,
    )


def endpoint(usecases: CoordinatorUseCases) -> Endpoint:
    """The gRPC service over the use cases."""
    return Endpoint(
        coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server,
        CoordinatorServicer(usecases),
    )
