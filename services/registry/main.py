"""Composition of the registry process."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import (
    budget_pb2,
    budget_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    performance_pb2,
    performance_pb2_grpc,
    promotion_pb2,
    promotion_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)

from services.common.clock import Clock, SystemClock
from services.common.config import read_secret
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.server import MAX_RECORD_BYTES, Endpoint, run_server
from services.common.grpc.strangers import StrangersServer
from services.common.migrations import require_migrated
from services.common.postgres import Database
from services.common.postgres_watch import PostgresWatch
from services.common.refusal_spool import open_spool
from services.common.refusals import RefusalEvent, RefusalLog
from services.common.standing import Standing
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.registry.budget_servicer import BudgetServicer
from services.registry.config import EnrolmentConfig, RegistryConfig
from services.registry.domain.entities import Event, StrikeRule
from services.registry.enrolling import CredentialServicer, EnrolmentServicer
from services.registry.issuing import Issuer
from services.registry.membership_servicer import MembershipServicer
from services.registry.performance_servicer import PerformanceServicer
from services.registry.promotion_servicer import PromotionServicer
from services.registry.relay import Relay
from services.registry.servicer import RegistryServicer, UseCases
from services.registry.store import MIGRATIONS, SCHEMA
from services.registry.store.postgres import PostgresStore
from services.registry.tending import MeasurementTender
from services.registry.usecases.attestations import Attestor
from services.registry.usecases.blobs import BlobUseCases
from services.registry.usecases.enrolment import EnrolmentUseCases, Terms
from services.registry.usecases.hospitals import HospitalUseCases
from services.registry.usecases.jobs import JobUseCases
from services.registry.usecases.ledgers import LedgerUseCases
from services.registry.usecases.membership import MembershipUseCases
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.performance import PerformanceUseCases
from services.registry.usecases.plans import PlanUseCases
from services.registry.usecases.promotions import PromotionUseCases
from services.registry.usecases.rosters import RosterUseCases
from services.registry.usecases.rounds import RoundUseCases
from services.registry.usecases.survivors import SurvivorUseCases
from services.registry.watch import HospitalWatch
from services.transparency.checkpoint import load_signing_key


def check(config: RegistryConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates or keys, an unreadable password file or an issuing
        authority that is none.
    """
    load_tls(config.server.tls)
    if config.signing_key is not None:
        load_signing_key(config.signing_key)
    if config.postgres.password_file is not None:
        read_secret(config.postgres.password_file)
    if config.enrolment is not None:
        build_issuer(config, config.enrolment, SystemClock())


async def main(config: RegistryConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID), (STORE_UNAVAILABLE) when PostgreSQL stays away at start, (WRONG_STATE) for a
        schema of another release.
    """
    setup_telemetry("registry", config.telemetry)
    clock = SystemClock()
    database = Database(config.postgres)
    await database.open()
    try:
        await database.wait()
        await require_migrated(database, SCHEMA, MIGRATIONS)
        async with MeshChannel(config.audit.target, config.server.tls) as audit:
            store = PostgresStore(database)
            relay = build_relay(config, store, audit)
            usecases = build_usecases(config, store, clock, relay)
            enrolment = build_enrolment(config, store, clock, relay)
            standing = Standing(usecases.hospitals.members, config.standing)
            hospitals = HospitalWatch(store, clock, config.budget, config.strikes)
            tender = MeasurementTender(usecases.performance.tend)
            background = [relay.run, standing.run, hospitals.run, tender.run, PostgresWatch(database).run]
            if config.enrolment is not None and enrolment is not None:
                background.append(strangers(config, config.enrolment, enrolment).run)
            await run_server(
                config.server,
                build_endpoints(usecases, enrolment, hospitals),
                background=background,
                dependencies=database.ready,
                admit=standing.admit_certificate,
                refusals=build_refusals(config, store, clock, relay),
                max_message_bytes=MAX_RECORD_BYTES,
            )
    finally:
        await database.close()
        shutdown_telemetry()


def build_endpoints(
    usecases: UseCases, enrolment: EnrolmentUseCases | None, hospitals: HospitalWatch
) -> list[Endpoint]:
    """The services of the registry's server over mutual TLS; CredentialService renews and revokes certificates."""
    return [
        Endpoint(
            registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
            registry_pb2_grpc.add_RegistryServiceServicer_to_server,
            RegistryServicer(usecases),
        ),
        Endpoint(
            promotion_pb2.DESCRIPTOR.services_by_name["PromotionService"],
            promotion_pb2_grpc.add_PromotionServiceServicer_to_server,
            PromotionServicer(usecases.promotions),
        ),
        Endpoint(
            membership_pb2.DESCRIPTOR.services_by_name["MembershipService"],
            membership_pb2_grpc.add_MembershipServiceServicer_to_server,
            MembershipServicer(usecases.membership),
        ),
        Endpoint(
            performance_pb2.DESCRIPTOR.services_by_name["PerformanceService"],
            performance_pb2_grpc.add_PerformanceServiceServicer_to_server,
            PerformanceServicer(usecases.performance),
        ),
        Endpoint(
            enrolment_pb2.DESCRIPTOR.services_by_name["CredentialService"],
            enrolment_pb2_grpc.add_CredentialServiceServicer_to_server,
            CredentialServicer(enrolment),
        ),
        Endpoint(
            budget_pb2.DESCRIPTOR.services_by_name["BudgetService"],
            budget_pb2_grpc.add_BudgetServiceServicer_to_server,
            BudgetServicer(hospitals),
        ),
    ]


def strangers(config: RegistryConfig, settings: EnrolmentConfig, enrolment: EnrolmentUseCases) -> StrangersServer:
    """The listener at which a hospital enrols, with the registry's own server certificate."""
    service = Endpoint(
        enrolment_pb2.DESCRIPTOR.services_by_name["EnrolmentService"],
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server,
        EnrolmentServicer(enrolment),
    )
    return StrangersServer(settings, config.server.tls, service, config.server.drain_s)


def build_issuer(config: RegistryConfig, settings: EnrolmentConfig, clock: Clock) -> Issuer:
    """Raises: FedmeshError(CONFIG_INVALID)."""
    return Issuer(settings.ca_certificate, settings.ca_key, config.server.tls.ca, clock)


def build_enrolment(
    config: RegistryConfig, store: PostgresStore, clock: Clock, relay: Relay
) -> EnrolmentUseCases | None:
    """What issues certificates; None when this registry does not.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    settings = config.enrolment
    if settings is None:
        return None
    terms = Terms(
        timedelta(seconds=settings.lifetime_s),
        timedelta(seconds=settings.backdate_s),
        load_tls(config.server.tls).identity,
    )
    mutations = Mutations(store, clock, relay.wake)
    return EnrolmentUseCases(store, mutations, clock, build_issuer(config, settings, clock), terms)


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


def build_refusals(config: RegistryConfig, store: PostgresStore, clock: Clock, relay: Relay) -> RefusalLog:
    """What tells the audit log of refused callers, by the outbox."""

    async def tell(refused: Sequence[RefusalEvent]) -> None:
        events = [
            Event(UUID(item.event_id), item.type, item.occurred_at, item.actor, item.subject, item.body_json)
            for item in refused
        ]
        await store.run("access.refused", None, lambda tx: tx.outbox.add(events))
        relay.wake()

    identity = load_tls(config.server.tls).identity
    return RefusalLog(identity, tell, clock, spool=open_spool(config.server.refusals))


def build_usecases(config: RegistryConfig, store: PostgresStore, clock: Clock, relay: Relay) -> UseCases:
    """All use cases over one store."""
    mutations = Mutations(store, clock, relay.wake)
    attestor = Attestor(None if config.signing_key is None else load_signing_key(config.signing_key))
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
        membership=MembershipUseCases(store, mutations, clock, enrols=config.enrolment is not None),
        rosters=RosterUseCases(store, mutations, clock, timedelta(hours=config.epochs.max_age_h)),
        plans=PlanUseCases(store, mutations, clock),
        jobs=JobUseCases(store, mutations, clock),
        survivors=SurvivorUseCases(store, mutations, clock),
        ledgers=LedgerUseCases(store, mutations, clock),
        rounds=RoundUseCases(store, mutations, clock, attestor),
        promotions=PromotionUseCases(store, mutations, clock, attestor),
        performance=PerformanceUseCases(store),
        blobs=blobs,
    )
