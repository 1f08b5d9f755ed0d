"""Composition of the audit process."""

from collections.abc import Sequence
from datetime import UTC

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.audit.archive_events import ArchiveEvents
from services.audit.config import AuditConfig
from services.audit.domain.event import Event
from services.audit.sequencer import Sequencer
from services.audit.servicer import AuditServicer
from services.audit.store import MIGRATIONS, SCHEMA
from services.audit.store.postgres import PostgresStore
from services.audit.usecases import LogUseCases
from services.audit.watch import WitnessWatch
from services.audit.witnessing import WitnessUseCases
from services.common.clock import SystemClock
from services.common.config import read_secret
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import Endpoint, run_server
from services.common.identity import Identity
from services.common.ids import new_id
from services.common.migrations import require_migrated
from services.common.postgres import Database
from services.common.postgres_watch import PostgresWatch
from services.common.refusal_spool import RefusalSpool, open_spool
from services.common.refusals import RefusalEvent, RefusalLog
from services.common.standing import Standing, registry_members
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.common.tls import load_tls
from services.transparency.checkpoint import load_signing_key


def check(config: AuditConfig) -> None:
    """Check what the configuration points at.

    Raises: FedmeshError(CONFIG_INVALID) for unusable certificates, password or signing key, or the key of another log.
    """
    consortium = load_tls(config.server.tls).identity.consortium
    if config.postgres.password_file is not None:
        read_secret(config.postgres.password_file)
    name = load_signing_key(config.signing_key).name
    if name != f"{consortium}/audit":
        raise FedmeshError(Code.CONFIG_INVALID, f"the signing key is of {name}, not of {consortium}/audit")


async def main(config: AuditConfig) -> None:
    """Serve until told to stop.

    Raises: FedmeshError(CONFIG_INVALID), also for a key that is not this log's; (STORE_UNAVAILABLE) when PostgreSQL
        stays away at start; (WRONG_STATE) for a schema of another release or a tree that contradicts its checkpoint.
    """
    setup_telemetry("audit", config.telemetry)
    key = load_signing_key(config.signing_key)
    database = Database(config.postgres)
    await database.open()
    try:
        await database.wait()
        await require_migrated(database, SCHEMA, MIGRATIONS)
        store = PostgresStore(database)
        sequencer = Sequencer(
            store,
            key,
            SystemClock(),
            max_events=config.batch.max_events,
            max_queued_events=config.batch.max_queued_events,
        )
        log = LogUseCases(store, sequencer, key)
        witnesses = WitnessUseCases(store, key, SystemClock(), config.witness.period_s)
        await log.require_own_log()
        async with MeshChannel(config.registry.target, config.server.tls) as registry:
            standing = Standing(registry_members(registry), config.standing)
            service = load_tls(config.server.tls).identity
            await run_server(
                config.server,
                [endpoint(log, witnesses)],
                background=[
                    sequencer.run,
                    standing.run,
                    WitnessWatch(store).run,
                    PostgresWatch(database).run,
                    ArchiveEvents(store, log, service).run,
                ],
                dependencies=database.ready,
                admit=standing.admit,
                refusals=build_refusals(log, service, open_spool(config.server.refusals)),
            )
    finally:
        await database.close()
        shutdown_telemetry()


def build_refusals(log: LogUseCases, service: Identity, spool: RefusalSpool | None = None) -> RefusalLog:
    """What tells this log of the callers that it refused."""

    async def tell(refused: Sequence[RefusalEvent]) -> None:
        await log.append(service, new_id(), [_event(item) for item in refused])

    return RefusalLog(service, tell, SystemClock(), spool=spool)


def _event(refused: RefusalEvent) -> Event:
    at = refused.occurred_at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    return Event(refused.event_id, refused.type, f"{at}000Z", refused.actor, refused.subject, refused.body_json)


def endpoint(log: LogUseCases, witnesses: WitnessUseCases) -> Endpoint:
    """The gRPC service over a log."""
    return Endpoint(
        audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
        audit_pb2_grpc.add_AuditServiceServicer_to_server,
        AuditServicer(log, witnesses),
    )
