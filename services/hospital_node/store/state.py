"""What the node remembers beside its ledger: cursor, ciphertexts by attempt, model states by content."""

import fcntl
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import AttemptRecord
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.files import write_durably
from services.hospital_node.store.sqlite import Database

STATE_FILE: Final = "state.sqlite"
_VERSION: Final = 1
_SCHEMA: Final = """
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
_KEY: Final = "job_id = ? AND round = ? AND attempt = ?"


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
    """See `domain.ports.NodeState` for the contract."""

    def __init__(self, data_dir: Path) -> None:
        """Raises: FedmeshError(CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE)."""
        self._ciphertexts = data_dir / "ciphertexts"
        self._states = data_dir / "states"
        for folder in (self._ciphertexts, self._states):
            folder.mkdir(mode=0o700, exist_ok=True)
            for partial in folder.glob(".*.partial"):
                partial.unlink()
        self._database = Database(data_dir / STATE_FILE, _SCHEMA, _VERSION)

    def cursor(self) -> str:
        with self._database.connection() as connection:
            row = connection.execute("SELECT value FROM cursor").fetchone()
            return "" if row is None else str(row[0])

    def save_cursor(self, cursor: str) -> None:
        with self._database.connection() as connection:
            # An old cursor only repeats tasks, which is harmless: not worth waiting for the disk.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("INSERT OR REPLACE INTO cursor VALUES (1, ?)", (cursor,))

    def save_ciphertext(self, attempt: AttemptId, content: bytes) -> None:
        write_durably(self._ciphertext_path(attempt), content)
        with self._database.transaction() as connection:
            _set(connection, attempt, "ciphertext_sha256", hashlib.sha256(content).hexdigest())

    def ciphertext(self, attempt: AttemptId) -> bytes | None:
        expected = self.record(attempt).ciphertext_sha256
        try:
            content = self._ciphertext_path(attempt).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == expected else None

    def record(self, attempt: AttemptId) -> AttemptRecord:
        with self._database.connection() as connection:
            row = connection.execute(
                f"SELECT ciphertext_sha256, sum_sha256 FROM attempts WHERE {_KEY}",  # noqa: S608 - a constant
                _key(attempt),
            ).fetchone()
            return AttemptRecord("", "") if row is None else AttemptRecord(*row)

    def pin_sum(self, attempt: AttemptId, sum_sha256: str) -> None:
        with self._database.transaction() as connection:
            row = connection.execute(
                f"SELECT sum_sha256 FROM attempts WHERE {_KEY}",  # noqa: S608 - a constant
                _key(attempt),
            ).fetchone()
            pinned = "" if row is None else row[0]
            if pinned not in ("", sum_sha256):
                raise FedmeshError(Code.WRONG_STATE, f"attempt {attempt} is bound to another sum: refused to decrypt")
            if not pinned:
                _set(connection, attempt, "sum_sha256", sum_sha256)

    def save_blob(self, job_id: str, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
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

    def adopt(self, job_id: str, version: int, sha256: str) -> None:
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

    def finish_before(self, attempt: AttemptId, *, inclusive: bool) -> None:
        for path in self._ciphertexts.glob(f"{attempt.job_id}.*"):
            _, round_text, attempt_text = path.name.split(".")
            other = AttemptId(attempt.job_id, int(round_text), int(attempt_text))
            if other < attempt or (inclusive and other == attempt):
                path.unlink(missing_ok=True)

    def finish_job(self, job_id: str) -> None:
        for path in self._ciphertexts.glob(f"{job_id}.*"):
            path.unlink(missing_ok=True)

    def _ciphertext_path(self, attempt: AttemptId) -> Path:
        return self._ciphertexts / f"{attempt.job_id}.{attempt.round}.{attempt.attempt}"


def _key(attempt: AttemptId) -> tuple[str, int, int]:
    return attempt.job_id, attempt.round, attempt.attempt


def _set(connection: sqlite3.Connection, attempt: AttemptId, column: str, value: str) -> None:
    connection.execute(
        f"INSERT INTO attempts (job_id, round, attempt, {column}) VALUES (?1, ?2, ?3, ?4)"  # noqa: S608 - our column
        f" ON CONFLICT DO UPDATE SET {column} = ?4",
        (*_key(attempt), value),
    )
