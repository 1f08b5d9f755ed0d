"""Composition of the registry process."""

from datetime import timedelta

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc

from services.common.clock import Clock, SystemClock
from services.common.config import read_secret
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.server import MAX_RECORD_BYTES, Endpoint, run_server
from services.common.postgres import Database, require_migrated
from services.common.postgres_watch import PostgresWatch
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.registry.config import RegistryConfig
from services.registry.domain.entities import StrikeRule
from services.registry.relay import Relay
from services.registry.servicer import RegistryServicer, UseCases
from services.registry.store import MIGRATIONS, SCHEMA
from services.registry.store.postgres import PostgresStore
from services.registry.usecases.blobs import BlobUseCases
from services.registry.usecases.hospitals import HospitalUseCases
from services.registry.usecases.jobs import JobUseCases
from services.registry.usecases.ledgers import LedgerUseCases
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.plans import PlanUseCases
from services.registry.usecases.rosters import RosterUseCases
from services.registry.usecases.rounds import RoundUseCases
from services.registry.usecases.survivors import SurvivorUseCases
from services.registry.watch import HospitalWatch


def check(config: RegistryConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates or an unreadable password file.
    """
    load_tls(config.server.tls)
    if config.postgres.password_file is not None:
        read_secret(config.postgres.password_file)


async def main(config: RegistryConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID), (STORE_UNAVAILABLE) when PostgreSQL is away at start, (WRONG_STATE) for a
        schema of another release.
    """
    setup_telemetry("registry", config.telemetry)
    clock = SystemClock()
    database = Database(config.postgres)
    await database.open()
    try:
        await require_migrated(database, SCHEMA, MIGRATIONS)
        async with MeshChannel(config.audit.target, config.server.tls) as audit:
            store = PostgresStore(database)
            relay = build_relay(config, store, audit)
            hospitals = HospitalWatch(store, clock, config.budget, config.strikes)
            servicer = RegistryServicer(build_usecases(config, store, clock, relay))
            await run_server(
                config.server,
                [
                    Endpoint(
                        registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
                        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
                        servicer,
                    )
                ],
                background=[relay.run, hospitals.run, PostgresWatch(database).run],
                dependencies=database.ready,
                max_message_bytes=MAX_RECORD_BYTES,
            )
    finally:
        await database.close()
        shutdown_telemetry()


def build_relay(config: RegistryConfig, store: PostgresStore, audit: MeshChannel) -> Relay:
    """The relay of the outbox to the audit service behind a channel."""
    stub = audit.stub(audit_pb2_grpc.AuditServiceStub)

    async def append(request: audit_pb2.AppendEventsRequest) -> audit_pb2.AppendEventsResponse:
        response: audit_pb2.AppendEventsResponse = await call(
            stub.AppendEvents, request, timeout_s=config.relay.timeout_s
        )
        return response

    return Relay(
        store,
        append,
        interval_s=config.relay.interval_s,
        batch=config.relay.batch,
        claim_s=config.relay.claim_s,
        max_backoff_s=config.relay.max_backoff_s,
    )


def build_usecases(config: RegistryConfig, store: PostgresStore, clock: Clock, relay: Relay) -> UseCases:
    """All use cases over one store."""
    mutations = Mutations(store, clock, relay.wake)
    blobs = BlobUseCases(
        store,
        clock,
        relay.wake,
        max_bytes=config.blobs.max_bytes,
        max_uploads=config.blobs.max_uploads,
        memory_bytes=config.blobs.memory_bytes,
        spool_dir=None if config.blobs.spool_dir is None else str(config.blobs.spool_dir),
        idle_s=config.blobs.idle_s,
    )
    return UseCases(
        hospitals=HospitalUseCases(store, mutations, clock, StrikeRule(config.strikes.limit, config.strikes.window_s)),
        rosters=RosterUseCases(store, mutations, clock, timedelta(hours=config.epochs.max_age_h)),
        plans=PlanUseCases(store, mutations, clock),
        jobs=JobUseCases(store, mutations, clock),
        survivors=SurvivorUseCases(store, mutations, clock),
        ledgers=LedgerUseCases(store, mutations, clock),
        rounds=RoundUseCases(store, mutations, clock),
        blobs=blobs,
    )
