"""A registry in this process, over real PostgreSQL and real mutual TLS, and clients with certificates."""

import asyncio
import base64
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import (
    budget_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    performance_pb2_grpc,
    promotion_pb2_grpc,
    registry_pb2_grpc,
)
from fedmesh.registry.v1 import registry_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.clock import SystemClock
from services.common.config import ClientConfig, ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.grpc.server import MAX_RECORD_BYTES, Endpoint, MeshServer
from services.common.grpc.strangers import StrangersServer
from services.common.ids import new_id
from services.common.migrations import migrate
from services.common.postgres import Database
from services.common.standing import Standing, StandingConfig
from services.embedded.ca import CertificateAuthority, create_ca
from services.plans.manifest import PlanManifest, canonical_bytes, load_manifest
from services.registry.config import BlobConfig, EnrolmentConfig, RegistryConfig, RelayConfig, StrikeConfig
from services.registry.main import (
    build_endpoints,
    build_enrolment,
    build_refusals,
    build_relay,
    build_usecases,
    strangers,
)
from services.registry.relay import Relay
from services.registry.store import MIGRATIONS, SCHEMA
from services.registry.store.postgres import PostgresStore
from services.registry.usecases.enrolment import EnrolmentUseCases
from services.registry.watch import HospitalWatch
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.roster import MemberKeys, Roster, as_roster, found, sign_roster, succeed
from services.secure_sum.statements import (
    PUBLIC_KEY_BYTES,
    AttemptRef,
    Box,
    EpochStatement,
    Signed,
    Survivor,
    Survivors,
    sign,
    sign_bytes,
)
from services.transparency.checkpoint import generate_key
from tests.support.audit_log import ListAuditLog
from tests.support.stores import PostgresDatabase

CONSORTIUM = "consortium.test"
PLANS = Path(__file__).parents[3] / "plans"
HOSPITALS = tuple(f"hospital-{number:02d}" for number in range(1, 6))


@cache
def manifest(private: bool = False, rounds: int = 2) -> PlanManifest:
    name = "readmission-logistic-private.yaml" if private else "readmission-logistic.yaml"
    loaded = load_manifest(PLANS / name)
    return loaded.model_copy(update={"rounds": loaded.rounds.model_copy(update={"count": rounds}), "checks": None})


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC))
    return stamp


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def keys(name: str) -> MemberKeys:
    return MemberKeys.generate(name)


def founding(*names: str, consortium: str = CONSORTIUM) -> pb.PublishRosterRequest:
    """A founding roster that every member signed."""
    statement = found(consortium, [keys(name).public() for name in names])
    return publishing(statement, *names)


def following(present: Roster, *names: str, signers: tuple[str, ...] | None = None) -> pb.PublishRosterRequest:
    """The roster of these members after `present`, signed by all its members unless others are named."""
    statement = succeed(present, [keys(name).public() for name in names])
    return publishing(statement, *(present.ids if signers is None else signers))


def publishing(statement: bytes, *signers: str) -> pb.PublishRosterRequest:
    signatures = [
        round_pb2.Signature(hospital_id=name, signature=sign_roster(statement, keys(name))) for name in signers
    ]
    return pb.PublishRosterRequest(request_id=new_id(), statement=statement, signatures=signatures)


def an_epoch(
    roster: Roster, number: int = 1, maker: str = "", content: str = "c2VhbGVk", *, public: bool = False
) -> Signed:
    """An epoch statement that is in order, with boxes that nobody can open. public: with a public key of nothing."""
    maker = maker or roster.ids[0]
    statement = EpochStatement(
        roster=roster.sha256,
        epoch=number,
        maker=maker,
        parameter_set="bfv-n4096-q60-t48-v2",
        public_key=base64.b64encode(bytes(PUBLIC_KEY_BYTES)).decode() if public else None,
        key_sha256=digest(f"{maker} {number} {content}".encode()),
        content=content,
        boxes=tuple(Box(to=name, box="ab" * 92) for name in roster.ids),
    )
    return sign(statement, keys(maker))


def signed(value: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=value.hospital_id, statement=value.statement, signature=value.signature)


def survivors(
    job: pb.Job, version: int, attempt: int, names: tuple[str, ...] = (), *, epoch: int = 1, salt: str = ""
) -> bytes:
    """The list of survivors of an attempt: the whole cohort, unless others are named."""
    return Survivors(
        roster=job.roster_sha256,
        epoch=epoch,
        attempt=AttemptRef(job_id=job.job_id, round=version, attempt=attempt),
        adverts=digest(f"adverts {salt}".encode()),
        sharers=tuple(job.hospital_ids),
        survivors=tuple(
            Survivor(hospital_id=name, upload=digest(f"{name} {version} {salt}".encode()))
            for name in names or job.hospital_ids
        ),
    ).encode()


def storing(
    job: pb.Job,
    version: int,
    attempt: int,
    statement: bytes = b"",
    signers: tuple[str, ...] | None = None,
    details: bytes = b"details",
) -> pb.StoreSurvivorsRequest:
    """The survivors of an attempt, signed by the whole cohort unless others are named."""
    statement = statement or survivors(job, version, attempt)
    confirmations = [
        round_pb2.Signature(hospital_id=name, signature=sign_bytes(statement, keys(name)))
        for name in (job.hospital_ids if signers is None else signers)
    ]
    told = pb.Survivors(
        attempt=round_pb2.Attempt(job_id=job.job_id, round=version, attempt=attempt),
        statement=statement,
        confirmations=confirmations,
        details=details,
    )
    return pb.StoreSurvivorsRequest(request_id=new_id(), survivors=told)


@dataclass
class Registry:
    """Handles of one running registry and its neighbours."""

    ca: CertificateAuthority
    database: PostgresDatabase
    pool: Database
    store: PostgresStore
    relay: Relay
    server: MeshServer
    audit: ListAuditLog
    audit_server: MeshServer
    stack: contextlib.AsyncExitStack
    door: StrangersServer
    watch: HospitalWatch
    enrolment: EnrolmentUseCases
    channels: dict[str, MeshChannel] = field(default_factory=dict)

    def stub(self, tls: TlsConfig, kind: Any = registry_pb2_grpc.RegistryServiceStub) -> Any:
        key = str(tls.certificate)
        if key not in self.channels:
            self.channels[key] = MeshChannel(f"127.0.0.1:{self.server.port}", tls, max_message_bytes=MAX_RECORD_BYTES)
        return self.channels[key].stub(kind)

    def operator(self, name: str = "alice") -> Any:
        return self.stub(self._tls("operator", name))

    def hospital(self, name: str = HOSPITALS[0]) -> Any:
        return self.stub(self._tls("hospital", name))

    def service(self, name: str = "coordinator") -> Any:
        return self.stub(self._tls("service", name))

    def promotion(self, name: str = "alice", kind: str = "operator") -> Any:
        """The service of promotion, called as an operator unless another kind is given."""
        return self.stub(self._tls(kind, name), promotion_pb2_grpc.PromotionServiceStub)

    def performance(self, name: str = "alice", kind: str = "operator") -> Any:
        """The service of performance, called as an operator unless another kind is given."""
        return self.stub(self._tls(kind, name), performance_pb2_grpc.PerformanceServiceStub)

    def budgets(self, name: str = "coordinator", kind: str = "service") -> Any:
        """The service of budgets, called as the coordinator unless another caller is given."""
        return self.stub(self._tls(kind, name), budget_pb2_grpc.BudgetServiceStub)

    def membership(self, name: str = "alice") -> Any:
        """The service of changes of membership, called as an operator."""
        return self.stub(self._tls("operator", name), membership_pb2_grpc.MembershipServiceStub)

    def _tls(self, kind: str, name: str) -> TlsConfig:
        stem = name if kind == "service" else f"{kind}-{name}"
        if (self.ca.folder / f"{stem}.pem").exists():
            return TlsConfig(
                ca=self.ca.folder / "ca.pem",
                certificate=self.ca.folder / f"{stem}.pem",
                key=self.ca.folder / f"{stem}.key",
            )
        issued: TlsConfig = getattr(self.ca, f"issue_{kind}")(name)
        return issued

    def sql(self, statement: str, *parameters: object, role: str = "postgres") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database.dsn(role)) as connection:
            result = connection.execute(statement.encode(), parameters)
            return result.fetchall() if result.description else []

    # --- steps that many tests take

    async def register(self, *names: str) -> None:
        for name in names:
            request = pb.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=name.title())
            await call(self.operator().RegisterHospital, request)

    async def suspend(self, hospital: str) -> None:
        request = pb.SetHospitalStatusRequest(
            request_id=new_id(), hospital_id=hospital, status=pb.HOSPITAL_STATUS_SUSPENDED, reason="why"
        )
        await call(self.operator().SetHospitalStatus, request)

    async def propose(self, kind: str, hospital: str, **facts: Any) -> str:
        """Propose a change of membership (`invite`, `reinstate`, `remove`) as alice: its id."""
        number = membership_pb2.MembershipChangeKind.Value(f"MEMBERSHIP_CHANGE_KIND_{kind.upper()}")
        request = membership_pb2.ProposeMembershipChangeRequest(
            request_id=new_id(), kind=number, hospital_id=hospital, reason="why", **facts
        )
        answer = await call(self.membership().ProposeMembershipChange, request)
        return str(answer.change.change_id)

    async def approve(self, change_id: str, by: str = "bob") -> membership_pb2.MembershipChange:
        request = membership_pb2.ApproveMembershipChangeRequest(request_id=new_id(), change_id=change_id)
        answer = await call(self.membership(by).ApproveMembershipChange, request)
        change: membership_pb2.MembershipChange = answer.change
        return change

    async def decide(self, kind: str, hospital: str, **facts: Any) -> None:
        """A change of membership, as two people make it."""
        await self.approve(await self.propose(kind, hospital, **facts))

    async def approved_plan(self, private: bool = False, rounds: int = 2, parameters: str = DEFAULT.name) -> str:
        plan_of = manifest(private, rounds)
        encoding = plan_of.encoding.model_copy(update={"parameter_set": parameters})
        content = canonical_bytes(plan_of.model_copy(update={"encoding": encoding}))
        plan = await call(self.operator().CreatePlan, pb.CreatePlanRequest(request_id=new_id(), manifest=content))
        request = pb.ApprovePlanRequest(request_id=new_id(), plan_id=plan.plan.plan_id)
        approved = await call(self.operator("bob").ApprovePlan, request)
        return str(approved.plan.plan_id)

    async def found(self, *hospitals: str) -> Roster:
        """The present roster, with a key epoch; when there is none, one of these hospitals, registered before."""
        listed = (await call(self.operator().ListRosters, pb.ListRostersRequest())).rosters
        if listed:
            return as_roster(listed[-1].statement)
        known = await call(self.operator().ListHospitals, pb.ListHospitalsRequest())
        await self.register(*sorted(set(hospitals) - {item.hospital_id for item in known.hospitals}))
        published = await call(self.operator().PublishRoster, founding(*hospitals))
        roster = as_roster(published.roster.statement)
        await self.publish_epoch(an_epoch(roster))
        return roster

    async def publish_epoch(self, epoch: Signed) -> round_pb2.Signed:
        request = pb.PublishEpochRequest(request_id=new_id(), epoch=signed(epoch))
        response: pb.PublishEpochResponse = await call(self.hospital(epoch.hospital_id).PublishEpoch, request)
        return response.epoch

    async def job(self, *hospitals: str, private: bool = False, rounds: int = 2) -> pb.Job:
        """A new running job; when there is no roster yet, its hospitals found one."""
        hospitals = hospitals or HOSPITALS
        await self.found(*hospitals)
        plan_id = await self.approved_plan(private, rounds)
        request = pb.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=hospitals)
        created: pb.CreateJobResponse = await call(self.operator().CreateJob, request)
        return created.job

    async def open_attempt(self, job_id: str, round_number: int) -> int:
        request = pb.OpenAttemptRequest(request_id=new_id(), job_id=job_id, round=round_number)
        return int((await call(self.service().OpenAttempt, request)).attempt.attempt)

    async def survive(self, job: pb.Job, version: int, attempt: int) -> None:
        """Store the survivors of an attempt: everybody."""
        await call(self.service().StoreSurvivors, storing(job, version, attempt))

    async def ready(self, job: pb.Job, version: int = 1, content: bytes = b"state") -> tuple[int, str]:
        """Take a job up to the commit of a version: its attempt and the new state."""
        attempt = await self.open_attempt(job.job_id, version)
        await self.survive(job, version, attempt)
        return attempt, await self.upload(job.hospital_ids[0], job.job_id, content)

    async def upload(self, hospital: str, job_id: str, content: bytes) -> str:
        response = await call(self.hospital(hospital).UploadBlob, lambda: parts(job_id, content))
        return str(response.sha256)

    async def download(self, stub: Any, sha256: str) -> bytes:
        return b"".join([part.chunk async for part in stream(stub.DownloadBlob, pb.DownloadBlobRequest(sha256=sha256))])

    async def commit(self, job: pb.Job, version: int, content: bytes = b"", **changes: Any) -> pb.Job:
        """Take a job through one round."""
        attempt, state = await self.ready(job, version, content or f"state {version}".encode())
        request = pb.CommitRoundRequest(request_id=new_id(), round=a_round(job, version, attempt, state, **changes))
        committed: pb.CommitRoundResponse = await call(self.service().CommitRound, request)
        return committed.job

    async def settled(self, condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
        """Wait until a condition holds."""
        ending = time.monotonic() + seconds
        while not await condition():
            assert time.monotonic() < ending, "the condition never held"
            await asyncio.sleep(0.02)

    async def drained(self) -> None:
        """Wait until the audit log has every event of the outbox."""

        async def empty() -> bool:
            return self.sql("select 1 from registry.outbox where log_index is null and refusal is null") == []

        await self.settled(empty)


def parts(job_id: str, content: bytes, **header: Any) -> Iterator[pb.UploadBlobRequest]:
    """An upload in chunks; `header` overrides what its header says."""
    facts = {"request_id": new_id(), "job_id": job_id, "sha256": digest(content), "size_bytes": len(content), **header}
    yield pb.UploadBlobRequest(header=pb.BlobHeader(**facts))
    for start in range(0, len(content), 1 << 20):
        yield pb.UploadBlobRequest(chunk=content[start : start + (1 << 20)])


def a_round(job: pb.Job, version: int, attempt: int, state: str, /, **changes: Any) -> pb.CommittedRound:
    """A round in which every hospital took part; `changes` overrides its fields."""
    facts: dict[str, Any] = {
        "attempt": round_pb2.Attempt(job_id=job.job_id, round=version, attempt=attempt),
        "version": version,
        "contributions": [
            round_pb2.Contribution(
                hospital_id=name,
                ciphertext_sha256=digest(f"{name} {version}".encode()),
                # The first hospital is a version behind, as in an asynchronous round.
                age=int(version > 1 and name == HOSPITALS[0]),
            )
            for name in job.hospital_ids
        ],
        "sum_sha256": digest(b"sum"),
        "agreeing": list(job.hospital_ids),
        "finalizer": job.hospital_ids[0],
        "attesting": list(job.hospital_ids[1:]),
        "state_sha256": state,
        "metrics_json": '{"validation_auroc":0.64,"validation_loss":0.31}',
        "sealed_at": now(),
        "upload_bytes": 33_000,
        "survivors_sha256": digest(survivors(job, version, attempt)),
        **changes,
    }
    return pb.CommittedRound(**facts)


def burning(job: pb.Job, version: int, attempt: int, **changes: Any) -> pb.CommitRoundRequest:
    """The commit of a burnt version; `changes` overrides fields of the round."""
    nothing = {"agreeing": [], "attesting": [], "sum_sha256": "", "finalizer": "", "metrics_json": ""}
    told = a_round(job, version, attempt, "", **{**nothing, "burnt": True, "burnt_reason": "too few", **changes})
    return pb.CommitRoundRequest(request_id=new_id(), round=told)


def striking(hospital: str, **changes: Any) -> pb.RecordStrikeRequest:
    facts: dict[str, Any] = {"request_id": new_id(), "code": "ciphertext-invalid", "reason": "why", **changes}
    return pb.RecordStrikeRequest(hospital_id=hospital, **facts)


def an_event(event_type: str = "round.sealed", actor: str = "", **changes: Any) -> audit_pb2.Event:
    facts: dict[str, Any] = {
        "event_id": new_id(),
        "type": event_type,
        "occurred_at": now(),
        "actor": actor or f"spiffe://{CONSORTIUM}/service/coordinator",
        "subject": f"job/{new_id()}",
        "body_json": '{"round":1}',
        **changes,
    }
    return audit_pb2.Event(**facts)


async def refused(awaitable: Awaitable[Any]) -> FedmeshError:
    """The error of a call that must fail."""
    try:
        await awaitable
    except FedmeshError as error:
        return error
    raise AssertionError("the call was not refused")


async def code(awaitable: Awaitable[Any]) -> Code:
    return (await refused(awaitable)).code


def signing_key(folder: Path) -> Path:
    """The registry's signing key beside its certificates; made when there is none."""
    path = folder / "ca" / "statements.key"
    if not path.exists():
        generate_key(path, f"{CONSORTIUM}/registry")
    return path


@contextlib.asynccontextmanager
async def running_registry(
    database: PostgresDatabase, folder: Path, audit_endpoint: Endpoint | None = None
) -> AsyncIterator[Registry]:
    """A registry with its relay and an audit log (in memory unless another is given), on free ports."""
    await asyncio.to_thread(migrate, database.config("registry_migrator"), SCHEMA, MIGRATIONS)
    ca = create_ca(folder / "ca", CONSORTIUM)
    audit_log = ListAuditLog()
    audit_server = MeshServer(
        ServerConfig(listen="127.0.0.1:0", tls=ca.issue_service("audit"), drain_s=0),
        [
            audit_endpoint
            or Endpoint(
                audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
                audit_pb2_grpc.add_AuditServiceServicer_to_server,
                audit_log,
            )
        ],
    )
    async with contextlib.AsyncExitStack() as stack:
        await audit_server.start()
        stack.push_async_callback(audit_server.stop)
        config = RegistryConfig(
            server=ServerConfig(listen="127.0.0.1:0", tls=ca.issue_service("registry"), drain_s=0),
            postgres=database.config("registry_service"),
            audit=ClientConfig(target=f"127.0.0.1:{audit_server.port}"),
            blobs=BlobConfig(max_bytes=8 << 20, max_uploads=4, idle_s=1.0, memory_bytes=1 << 20, spool_dir=folder),
            signing_key=signing_key(folder),
            relay=RelayConfig(interval_s=0.05, max_backoff_s=0.2),
            strikes=StrikeConfig(limit=3, window_s=60.0),
            standing=StandingConfig(interval_s=0.5),
            enrolment=EnrolmentConfig(
                listen="127.0.0.1:0",
                ca_certificate=ca.folder / "ca.pem",
                ca_key=ca.folder / "ca.key",
                per_minute=6000,
                burst=1000,
                all_per_minute=60_000,
            ),
        )
        pool = Database(config.postgres)
        await pool.open()
        stack.push_async_callback(pool.close)
        audit_channel = await stack.enter_async_context(MeshChannel(config.audit.target, config.server.tls))
        store = PostgresStore(pool)
        relay = build_relay(config, store, audit_channel)
        usecases = build_usecases(config, store, SystemClock(), relay)
        enrolment = build_enrolment(config, store, SystemClock(), relay)
        watch = HospitalWatch(store, SystemClock(), config.budget, config.strikes)
        standing = Standing(usecases.hospitals.members, config.standing)
        await standing.refresh()
        refusals = build_refusals(config, store, SystemClock(), relay)
        server = MeshServer(
            config.server,
            build_endpoints(usecases, enrolment, watch),
            admit=standing.admit_certificate,
            refused=refusals.note,
            max_message_bytes=MAX_RECORD_BYTES,
        )
        await server.start()
        stack.push_async_callback(server.stop)
        assert config.enrolment is not None
        assert enrolment is not None
        door = strangers(config, config.enrolment, enrolment)
        await door.start()
        stack.push_async_callback(door.stop)
        tasks = [asyncio.create_task(run()) for run in (relay.run, standing.run, refusals.run)]
        registry = Registry(
            ca, database, pool, store, relay, server, audit_log, audit_server, stack, door, watch, enrolment
        )
        try:
            yield registry
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for channel in registry.channels.values():
                await channel.close()
