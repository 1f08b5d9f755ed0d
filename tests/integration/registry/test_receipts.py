"""A hospital's receipt, from the real registry and the real log, witnessed by the roster; and who gets none."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2 as pb

from services.audit.main import endpoint
from services.audit.sequencer import Sequencer
from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
from services.audit.store.postgres import PostgresStore as AuditStore
from services.audit.usecases import LogUseCases
from services.audit.witnessing import WitnessUseCases
from services.cli.receipts import Asker, take, verify_file
from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.postgres import Database, migrate
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.config import HospitalConfig
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.store.witness import STATE_FILE
from services.hospital_node.usecases.witness import Witness
from services.secure_sum.roster import load_roster_file, save_roster_file
from services.transparency.checkpoint import generate_key, load_signing_key
from tests.support.stores import PostgresDatabase

from .harness import CONSORTIUM, HOSPITALS, Registry, burning, digest, founding, keys, running_registry

ME = HOSPITALS[1]


@dataclass
class Consortium:
    registry: Registry
    folder: Path

    def asker(self, name: str) -> Asker:
        """A hospital with its configuration, and a disk that knows nothing yet."""
        tls = self.registry._tls("hospital", name)
        audit = f"127.0.0.1:{self.registry.audit_server.port}"
        config = HospitalConfig.model_validate(
            {
                "hospital_id": name,
                "tls": tls.model_dump(),
                **{part: {"target": "127.0.0.1:1"} for part in ("coordinator", "aggregator")},
                "registry": {"target": f"127.0.0.1:{self.registry.server.port}"},
                "data": {"file": self.folder / "none"},
                "population": name,
                "data_dir": self.folder / name,
                "member_keys": self.folder / "none",
                "roster": self.folder / "roster.json",
                "witness": {"audit": {"target": audit}, "log_key": self.folder / "log.key"},
            }
        )
        assert config.witness is not None
        verifier = load_signing_key(self.folder / "log.key").verifier
        return Asker(config, config.witness, load_roster_file(config.roster), verifier)

    def sent(self, name: str, job_id: str, version: int, content: bytes) -> None:
        """Let a hospital's disk remember what it sent."""
        (self.folder / name).mkdir(exist_ok=True)
        SqliteNodeState(self.folder / name)
        with sqlite3.connect(self.folder / name / STATE_FILE) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO attempts (job_id, round, attempt, ciphertext_sha256) VALUES (?, ?, 1, ?)",
                (job_id, version, digest(content)),
            )

    async def witness(self, *names: str) -> None:
        await self.registry.drained()
        for name in names:
            asker = self.asker(name)
            (self.folder / name).mkdir(exist_ok=True)
            memory = SqliteNodeState(self.folder / name).witness
            async with MeshChannel(asker.witness.audit.target, asker.config.tls) as channel:
                audit = GrpcAuditLog(channel, 10.0)
                looker = Witness(audit, memory, keys(name), CONSORTIUM, asker.verifier, SystemClock(), 4)
                assert await looker.look() == "cosigned"


@pytest.fixture
async def consortium(postgres: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Consortium]:
    await asyncio.to_thread(migrate, postgres.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
    generate_key(tmp_path / "log.key", f"{CONSORTIUM}/audit")
    key = load_signing_key(tmp_path / "log.key")
    database = Database(postgres.config("audit_service"))
    await database.open()
    store = AuditStore(database)
    sequencer = Sequencer(store, key, SystemClock())
    sequencing = asyncio.create_task(sequencer.run())
    served = endpoint(LogUseCases(store, sequencer, key), WitnessUseCases(store, key, SystemClock(), 0.00001))
    request = founding(*HOSPITALS)
    signed = {item.hospital_id: item.signature for item in request.signatures}
    save_roster_file(tmp_path / "roster.json", request.statement, signed)
    try:
        async with running_registry(postgres, tmp_path, served) as registry:
            yield Consortium(registry, tmp_path)
    finally:
        sequencing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sequencing
        await database.close()


async def test_a_hospital_proves_that_it_was_counted_once(consortium: Consortium, tmp_path: Path) -> None:
    registry = consortium.registry
    job = await registry.job(rounds=3)
    await registry.commit(job, 1)
    await registry.commit(job, 2)
    consortium.sent(ME, job.job_id, 2, f"{ME} 2".encode())
    me, out = consortium.asker(ME), tmp_path / "receipt.json"
    await consortium.witness(*HOSPITALS[:3])
    with pytest.raises(FedmeshError, match="0 entries are witnessed: come again"):
        await take(me, job.job_id, 2, out)
    await consortium.witness(HOSPITALS[3])
    taken = await take(me, job.job_id, 2, out)
    assert verify_file(out, me.verifier, me.config.roster) == taken
    assert (taken.counted.hospital_id, taken.counted.ciphertext_sha256) == (ME, digest(f"{ME} 2".encode()))
    with pytest.raises(FedmeshError, match="cannot write"):
        await take(me, job.job_id, 2, out)
    with pytest.raises(FedmeshError, match="no version 3 yet"):
        await take(me, job.job_id, 3, out)
    attempt = await registry.open_attempt(job.job_id, 3)
    await registry.survive(job, 3, attempt)
    await call(registry.service().CommitRound, burning(job, 3, attempt))
    with pytest.raises(FedmeshError, match="burnt"):
        await take(me, job.job_id, 3, tmp_path / "burnt.json")


async def test_a_round_that_the_log_does_not_hold_yet_is_waited_for(registry: Registry) -> None:
    job = await registry.job(rounds=2)
    await registry.drained()
    registry.audit.away = True
    await registry.commit(job, 1)
    request = pb.GetRoundEntryRequest(job_id=job.job_id, version=1)
    with pytest.raises(FedmeshError, match="does not hold round 1 yet") as caught:
        await call(registry.hospital(ME).GetRoundEntry, request)
    assert caught.value.code is Code.WRONG_STATE
    registry.audit.away = False
    await registry.drained()
    found = await call(registry.hospital(ME).GetRoundEntry, request)
    assert registry.audit.events[found.index].event_id == found.event_id
    assert registry.audit.events[found.index].type == "round.committed"


async def test_who_gets_no_receipt(consortium: Consortium, tmp_path: Path) -> None:
    registry, out = consortium.registry, tmp_path / "receipt.json"
    await registry.found(*HOSPITALS)
    job = await registry.job(*HOSPITALS[:4], rounds=2)
    await registry.commit(job, 1)
    await consortium.witness(*HOSPITALS[:4])
    outsider = consortium.asker(HOSPITALS[4])
    with pytest.raises(FedmeshError) as caught:
        await take(outsider, job.job_id, 1, out)
    assert caught.value.code is Code.NOT_FOUND, "a job that it is not in does not exist for it"
    request = pb.GetRoundEntryRequest(job_id=job.job_id, version=1)
    with pytest.raises(FedmeshError) as caught:
        await call(registry.hospital(HOSPITALS[4]).GetRoundEntry, request)
    assert caught.value.code is Code.NOT_FOUND
    index = (await call(registry.hospital(ME).GetRoundEntry, request)).index
    async with MeshChannel(outsider.witness.audit.target, outsider.config.tls) as channel:
        audit = channel.stub(audit_pb2_grpc.AuditServiceStub)
        for place, code in ((index, Code.PERMISSION_DENIED), (0, Code.PERMISSION_DENIED), (10**6, Code.NOT_FOUND)):
            with pytest.raises(FedmeshError) as caught:
                await call(audit.GetEntry, audit_pb2.GetEntryRequest(index=place))
            assert caught.value.code is code
    consortium.sent(ME, job.job_id, 1, b"something else")
    with pytest.raises(FedmeshError, match="this hospital sent") as caught:
        await take(consortium.asker(ME), job.job_id, 1, out)
    assert caught.value.code is Code.PROOF_INVALID
    registry.sql("update registry.rounds set event_id = null")
    consortium.sent(ME, job.job_id, 1, f"{ME} 1".encode())
    with pytest.raises(FedmeshError, match="made no receipts"):
        await take(consortium.asker(ME), job.job_id, 1, out)
    assert not out.exists()
