"""What the node remembers beside its ledger: cursor, rosters, sealed model states by content, what it witnessed.

The secrets and ciphertexts of attempts are in the same database and in files of their own: see `attempts`.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import RosterFacts
from services.hospital_node.store.attempts import AttemptStore
from services.hospital_node.store.files import write_durably
from services.hospital_node.store.sqlite import Database
from services.hospital_node.store.witness import SINCE_3, STATE_FILE, WitnessStore

_VERSION: Final = 3
_SINCE_2: Final = """
ALTER TABLE attempts ADD COLUMN unmasked_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE attempts ADD COLUMN revealed INTEGER NOT NULL DEFAULT 0 CHECK (revealed IN (0, 1));
CREATE TABLE members (
    job_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    roster_sha256 TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (job_id, round, attempt)
) STRICT, WITHOUT ROWID;
CREATE TABLE rosters (
    version INTEGER PRIMARY KEY,
    statement BLOB NOT NULL,
    signatures TEXT NOT NULL
) STRICT
"""
_SINCE_1: Final = """
CREATE TABLE cursor (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    value TEXT NOT NULL
) STRICT;
CREATE TABLE attempts (
    job_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    ciphertext_sha256 TEXT NOT NULL DEFAULT '',
    sum_sha256 TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job_id, round, attempt)
) STRICT, WITHOUT ROWID;
CREATE TABLE blobs (
    job_id TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    version INTEGER,
    PRIMARY KEY (job_id, sha256)
) STRICT, WITHOUT ROWID
"""


def open_data_dir(data_dir: Path) -> int:
    """Make the node's folder private and lock it for this process; returns the descriptor that holds the lock.

    Raises: FedmeshError(CONFIG_INVALID) when it cannot be used, or another node uses it: two nodes on one ledger would
        answer for the same hospital.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        data_dir.chmod(0o700)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot use data_dir {data_dir}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise FedmeshError(Code.CONFIG_INVALID, f"another hospital node runs on data_dir {data_dir}") from error
    return descriptor


class SqliteNodeState:
    """See `domain.ports.NodeState` for the contract. `attempts` holds what belongs to single attempts, `witness` what
    was seen of the audit log."""

    def __init__(self, data_dir: Path) -> None:
        """Raises: FedmeshError(CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE)."""
        # A step that was superseded may still be writing a state while the next one adopts another.
        self._blobs = threading.Lock()
        self._states = data_dir / "states"
        self._states.mkdir(mode=0o700, exist_ok=True)
        for partial in self._states.glob(".*.partial"):
            partial.unlink()
        schema = ";".join((_SINCE_1, _SINCE_2, SINCE_3))
        self._database = Database(data_dir / STATE_FILE, schema, _VERSION, {1: _SINCE_2, 2: SINCE_3})
        self.attempts = AttemptStore(data_dir / "ciphertexts", self._database)
        self.witness = WitnessStore(self._database)

    def cursor(self) -> str:
        with self._database.connection() as connection:
            row = connection.execute("SELECT value FROM cursor").fetchone()
            return "" if row is None else str(row[0])

    def save_cursor(self, cursor: str) -> None:
        with self._database.connection() as connection:
            # An old cursor only repeats tasks, which is harmless: not worth waiting for the disk.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?)", (cursor,))

    def rosters(self) -> list[RosterFacts]:
        """The rosters that were verified here after the founding one, oldest first."""
        with self._database.connection() as connection:
            rows = connection.execute("SELECT statement, signatures FROM rosters ORDER BY version").fetchall()
            return [RosterFacts(row[0], _signatures(row[1])) for row in rows]

    def save_roster(self, version: int, facts: RosterFacts) -> None:
        """Remember a verified roster; one of its version is never replaced. Raises: FedmeshError(STORE_FULL)."""
        signatures = json.dumps({name: value.hex() for name, value in facts.signatures.items()}, sort_keys=True)
        with self._database.transaction() as connection:
            connection.execute("INSERT INTO rosters VALUES (?, ?, ?)", (version, facts.statement, signatures))

    def save_blob(self, job_id: str, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with self._blobs:
            # The row first: `adopt` deletes files that no row names.
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO blobs (job_id, sha256) VALUES (?, ?) ON CONFLICT DO NOTHING", (job_id, sha256)
                )
            if self.blob(sha256) is None:
                write_durably(self._states / sha256, content)
        return sha256

    def blob(self, sha256: str) -> bytes | None:
        try:
            content = (self._states / sha256).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == sha256 else None

    def adopt(self, job_id: str, version: int, sha256: str) -> int:
        with self._blobs:
            # Twice for every version: when it is committed, and when the next round builds on it.
            newest, own = self._adopted(job_id, sha256)
            if version < newest or version == newest == own:
                return newest
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO blobs VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET version = ?3",
                    (job_id, sha256, version),
                )
                connection.execute(
                    "DELETE FROM blobs WHERE job_id = ?1 AND coalesce(version, 0) < ?2 - 1", (job_id, version)
                )
                kept = {row[0] for row in connection.execute("SELECT sha256 FROM blobs")}
            for path in self._states.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)
        return version

    def _adopted(self, job_id: str, sha256: str) -> tuple[int, int]:
        """The newest version of a job that was adopted, and the one that a state was adopted as; 0 for none."""
        with self._database.connection() as connection:
            row = connection.execute(
                "SELECT max(version), max(CASE sha256 WHEN ?2 THEN version END) FROM blobs WHERE job_id = ?1",
                (job_id, sha256),
            ).fetchone()
            return int(row[0] or 0), int(row[1] or 0)


def _signatures(text: str) -> Mapping[str, bytes]:
    return {str(name): bytes.fromhex(value) for name, value in json.loads(text).items()}
