"""A real audit service: mTLS server, PostgreSQL with its roles, and clients with certificates of every kind."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fedmesh.audit.v1 import audit_pb2 as pb
from fedmesh.audit.v1 import audit_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.audit.main import build_refusals, endpoint
from services.audit.sequencer import Sequencer
from services.audit.store import MIGRATIONS
from services.audit.store.postgres import PostgresStore
from services.audit.usecases import LogUseCases
from services.audit.witnessing import WitnessUseCases
from services.common.clock import SystemClock
from services.common.config import ServerConfig, TlsConfig
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.server import MeshServer
from services.common.migrations import migrate
from services.common.postgres import Database
from services.common.tls import load_tls
from services.embedded.ca import CertificateAuthority, create_ca
from services.transparency.checkpoint import VerifierKey, generate_key, load_signing_key
from tests.support.stores import PostgresDatabase

CONSORTIUM = "consortium.test"


@dataclass(frozen=True)
class Replica:
    """A running audit server and its parts."""

    target: str
    log: LogUseCases
    verifier: VerifierKey


@dataclass(frozen=True)
class World:
    """What a test needs: a migrated database, an authority, the log's key."""

    postgres: PostgresDatabase
    ca: CertificateAuthority
    key_file: Path
    server_tls: TlsConfig

    @asynccontextmanager
    async def replica(self, *, period_s: float = 0.00001, **batch: int) -> AsyncIterator[Replica]:
        """A server on the database; several may run at once. period_s: short, to offer the newest checkpoint."""
        key = load_signing_key(self.key_file)
        database = Database(self.postgres.config("audit_service"))
        await database.open()
        store = PostgresStore(database)
        sequencer = Sequencer(store, key, SystemClock(), **batch)
        log = LogUseCases(store, sequencer, key)
        witnesses = WitnessUseCases(store, key, SystemClock(), period_s)
        config = ServerConfig(listen="127.0.0.1:0", tls=self.server_tls, drain_s=1)
        refusals = build_refusals(log, load_tls(config.tls).identity)
        server = MeshServer(config, [endpoint(log, witnesses)], refused=refusals.note)
        writing, telling = asyncio.create_task(sequencer.run()), asyncio.create_task(refusals.run())
        await server.start()
        try:
            yield Replica(f"127.0.0.1:{server.port}", log, key.verifier)
        finally:
            await server.stop()
            for task in (telling, writing):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await database.close()

    @asynccontextmanager
    async def client(self, replica: Replica, who: str = "coordinator") -> AsyncIterator["Client"]:
        """A caller: a service's name, `hospital` or `operator`."""
        issue: dict[str, Callable[[str], TlsConfig]] = {
            "hospital": self.ca.issue_hospital,
            "operator": self.ca.issue_operator,
        }
        async with MeshChannel(replica.target, issue.get(who, self.ca.issue_service)(who)) as channel:
            yield Client(channel.stub(audit_pb2_grpc.AuditServiceStub))


@dataclass(frozen=True)
class Client:
    stub: Any

    async def append(self, *events: pb.Event, patience_s: float = 0.0) -> pb.AppendEventsResponse:
        request = pb.AppendEventsRequest(request_id=str(uuid.uuid4()), events=events)
        response = await call(self.stub.AppendEvents, request, timeout_s=20, patience_s=patience_s)
        assert isinstance(response, pb.AppendEventsResponse)
        return response

    async def checkpoint(self) -> str:
        return str((await call(self.stub.GetCheckpoint, pb.GetCheckpointRequest())).checkpoint)


def event(**body: object) -> pb.Event:
    """A well-formed event with a new id."""
    at = Timestamp()
    at.GetCurrentTime()
    return pb.Event(
        event_id=str(uuid.uuid4()),
        type="contribution.accepted",
        occurred_at=at,
        actor="spiffe://consortium.test/hospital/h01",
        subject="job/17",
        body_json=json.dumps(body),
    )


@pytest.fixture
def migrations() -> Path:
    return MIGRATIONS


@pytest.fixture
def world(postgres: PostgresDatabase, tmp_path: Path, migrations: Path) -> World:
    migrate(postgres.config("audit_migrator"), "audit", migrations)
    ca = create_ca(tmp_path / "ca", CONSORTIUM)
    generate_key(tmp_path / "log.key", f"{CONSORTIUM}/audit")
    return World(postgres, ca, tmp_path / "log.key", ca.issue_service("audit"))


@pytest.fixture
async def replica(world: World) -> AsyncIterator[Replica]:
    async with world.replica() as running:
        yield running
