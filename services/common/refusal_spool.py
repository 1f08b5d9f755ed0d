"""Refused calls on disk, until the audit log has them.

One SQLite file: entries grow in their place, so that a storm of refusals takes no more room than its kinds; a write is
one transaction with one fsync; what a crash or a full disk leaves half done is not there. The format is this release's.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from prometheus_client import Gauge

from services.common.config import RefusalsConfig
from services.common.errors import Code, FedmeshError
from services.common.refusal_book import Changes, Entry, Kind
from services.common.telemetry import get_logger

log = get_logger(__name__)

FILE: Final = "refusals.sqlite"
DAMAGED: Final = "refusals.damaged.sqlite"
# An entry at its largest takes half a page, or less, and in the write-ahead log once more; a quarter is for the rest.
ENTRY_BYTES: Final = 8192
_PAGE_BYTES: Final = 4096
_WAL_PAGES: Final = 128
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL,
    caller TEXT NOT NULL,
    subject TEXT NOT NULL,
    method TEXT NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    count INTEGER NOT NULL,
    since TEXT NOT NULL,
    until TEXT NOT NULL,
    growing INTEGER NOT NULL CHECK (growing IN (0, 1)),
    gathered INTEGER NOT NULL CHECK (gathered IN (0, 1))
) STRICT
"""
DISK_FAILING: Final = Gauge(
    "fedmesh_access_refusals_disk_failing",
    "1 while refused calls cannot be written to the folder for them and wait in memory",
)
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class RefusalSpool:
    """The entries of one process in a folder of its own, which is made when it is not there.

    max_bytes: of its files. Raises: FedmeshError(STORE_UNAVAILABLE) when the folder cannot be used, or another process
    has it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path = folder / FILE
        self.most = max_bytes // ENTRY_BYTES
        self._pages = max_bytes // 2 // _PAGE_BYTES
        with _unavailable(self._path):
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                self._connection, self.kept = self._open()
            except _DamagedError as error:
                self._set_aside(error)
                self._connection, self.kept = self._open()

    def write(self, changes: Changes) -> None:
        """Make changes durable, all or none. From one thread at a time, whichever.

        Raises: FedmeshError(STORE_UNAVAILABLE), when the disk is full for instance.
        """
        with _unavailable(self._path):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [_row(entry) for entry in changes.entries],
                )
                self._connection.executemany("DELETE FROM entries WHERE seq = ?", [(seq,) for seq in changes.gone])
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                # Some errors have ended the transaction already.
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._connection.close()

    def _open(self) -> tuple[sqlite3.Connection, list[Entry]]:
        """The file and what is in it. Raises: _DamagedError."""
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            return connection, self._read(connection)
        except BaseException:
            connection.close()
            raise

    def _read(self, connection: sqlite3.Connection) -> list[Entry]:
        try:
            # Held for as long as the process lives: two that send the same entries would forget each other's.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_PAGES * _PAGE_BYTES}")
            connection.execute(f"PRAGMA max_page_count = {self._pages}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}; PRAGMA user_version = {_VERSION}; COMMIT")
            elif version != _VERSION:
                raise _DamagedError(f"it has version {version}, this release writes version {_VERSION}")
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise _DamagedError(found)
            return [_entry(row) for row in connection.execute("SELECT * FROM entries ORDER BY seq")]
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF in _DAMAGE:
                raise _DamagedError(str(error)) from error
            raise

    def _set_aside(self, error: "_DamagedError") -> None:
        """A service that did not start over this would refuse everybody, and tell of it nowhere."""
        kept = self._path.with_name(DAMAGED)
        for end in ("", "-wal"):
            with suppress(FileNotFoundError):
                os.replace(f"{self._path}{end}", f"{kept}{end}")
        log.error("refusals_spool_damaged", reason=str(error), kept=str(kept))


class _DamagedError(Exception):
    """The file is not what this release wrote."""


def open_spool(config: RefusalsConfig) -> RefusalSpool | None:
    """The spool that a configuration names, if there is one and it can be used; what is missing is in the log."""
    DISK_FAILING.set(0)
    if config.directory is None:
        log.warning("refusals_wait_in_memory", advice="set server.refusals.directory: see docs/people.md")
        return None
    try:
        return RefusalSpool(config.directory, config.max_bytes)
    except FedmeshError as error:
        DISK_FAILING.set(1)
        log.error("refusals_wait_in_memory", reason=error.message)
        return None


@contextmanager
def _unavailable(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"{path}: {error}") from error


def _row(entry: Entry) -> tuple[str | int, ...]:
    return (
        entry.seq,
        entry.event_id,
        *entry.kind,
        entry.count,
        entry.since.isoformat(),
        entry.until.isoformat(),
        int(entry.growing),
        int(entry.gathered),
    )


def _entry(row: tuple[str | int, ...]) -> Entry:
    seq, event_id, caller, subject, method, code, reason, count, since, until, growing, gathered = row
    return Entry(
        int(seq),
        str(event_id),
        Kind(str(caller), str(subject), str(method), str(code), str(reason)),
        int(count),
        datetime.fromisoformat(str(since)),
        datetime.fromisoformat(str(until)),
        bool(growing),
        bool(gathered),
    )
