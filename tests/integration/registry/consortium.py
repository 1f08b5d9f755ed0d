"""The real registry and the real audit log over one PostgreSQL, with hospitals that witness and ask for receipts."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from services.audit.main import endpoint
from services.audit.sequencer import Sequencer
from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
from services.audit.store.postgres import PostgresStore as AuditStore
from services.audit.usecases import LogUseCases
from services.audit.witnessing import WitnessUseCases
from services.cli.receipts import Asker
from services.common.clock import SystemClock
from services.common.grpc.client import MeshChannel
from services.common.migrations import migrate
from services.common.postgres import Database
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.config import HospitalConfig
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.store.witness import STATE_FILE
from services.hospital_node.usecases.witness import Witness
from services.secure_sum.roster import load_roster_file, save_roster_file
from services.transparency.checkpoint import load_signing_key
from tests.support.stores import PostgresDatabase

from .harness import CONSORTIUM, HOSPITALS, Registry, digest, founding, keys, running_registry


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
        assert await self.look(*names) == ["cosigned"] * len(names)

    async def look(self, *names: str) -> list[str]:
        """What each of these hospitals makes of the log."""
        outcomes = []
        for name in names:
            asker = self.asker(name)
            (self.folder / name).mkdir(exist_ok=True)
            memory = SqliteNodeState(self.folder / name).witness
            async with MeshChannel(asker.witness.audit.target, asker.config.tls) as channel:
                audit = GrpcAuditLog(channel, 10.0)
                looker = Witness(audit, memory, keys(name), CONSORTIUM, asker.verifier, SystemClock(), 4)
                outcomes.append(await looker.look())
        return outcomes


def save_founding_roster(path: Path) -> None:
    """The roster of all hospitals, as a file that each of them got by hand."""
    request = founding(*HOSPITALS)
    save_roster_file(path, request.statement, {item.hospital_id: item.signature for item in request.signatures})


@contextlib.asynccontextmanager
async def running_consortium(
    postgres: PostgresDatabase, folder: Path, log_database: PostgresDatabase | None = None
) -> AsyncIterator[Consortium]:
    """The centre on a database, with the files `log.key` and `roster.json` of a folder.

    log_database: where the audit log is, when elsewhere.
    """
    log_database = log_database or postgres
    await asyncio.to_thread(migrate, log_database.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
    key = load_signing_key(folder / "log.key")
    database = Database(log_database.config("audit_service"))
    await database.open()
    store = AuditStore(database)
    sequencer = Sequencer(store, key, SystemClock())
    sequencing = asyncio.create_task(sequencer.run())
    served = endpoint(LogUseCases(store, sequencer, key), WitnessUseCases(store, key, SystemClock(), 0.00001))
    try:
        async with running_registry(postgres, folder, served) as registry:
            yield Consortium(registry, folder)
    finally:
        sequencing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sequencing
        await database.close()
