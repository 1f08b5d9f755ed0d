"""SQLite as the node uses it: WAL, synchronous FULL, immediate transactions, errors of fedmesh."""

import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError

# How long a writer waits for another process's transaction.
_BUSY_S: Final = 10.0


class Database:
    """One SQLite file. A connection serves one transaction at a time, so any thread or process may use the file.

    A transaction that has returned is on the disk (WAL with synchronous = FULL syncs at every commit); one that raised,
    or whose process died, left nothing.
    """

    def __init__(self, path: Path, schema: str, version: int, upgrades: Mapping[int, str] | None = None) -> None:
        """Open or make the file. `schema` makes version `version` in an empty file; `upgrades[n]` makes n + 1 of n.

        Raises: FedmeshError(CONFIG_INVALID) for a file of another version or that is no database; STORE_FULL.
        """
        self.path = path
        # Opening one costs more than a short transaction; there are as many as were ever used at once.
        self._idle: deque[sqlite3.Connection] = deque()
        try:
            path.touch(mode=0o600)
        except OSError as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot write {path}: {error.strerror}") from error
        with sqlite_errors(path):
            # Never used again: while one connection is open, closing the others does not checkpoint and delete the WAL.
            self._keeper = self._connect()
            self._keeper.execute("PRAGMA journal_mode = WAL")
            self._keeper.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        with self.transaction() as connection:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                _run(connection, schema)
                found = version
            while found in (upgrades or {}):
                _run(connection, (upgrades or {})[found])
                found += 1
            connection.execute(f"PRAGMA user_version = {found}")
            if found != version:
                raise FedmeshError(
                    Code.CONFIG_INVALID,
                    f"{path} has schema version {found}, this build reads {version}: use the build that wrote it",
                )

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit mode, which nobody else uses meanwhile.

        Raises: FedmeshError(STORE_FULL, STORE_UNAVAILABLE, or INTERNAL for a damaged file).
        """
        with sqlite_errors(self.path):
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                # Anew every time: whoever had it last may have been content with less.
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
                # What is deleted from the file does not stay in the cache of an idle connection.
                connection.execute("PRAGMA shrink_memory")
            except BaseException:
                # Whatever state it is in, it does not stay.
                connection.close()
                raise
            self._idle.append(connection)

    def close(self) -> None:
        """Close what is open; everything is then in the one file. Nobody may use it meanwhile, or afterwards."""
        with sqlite_errors(self.path):
            for connection in (*self._idle, self._keeper):
                connection.close()
            self._idle.clear()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction that holds the lock from its start (BEGIN IMMEDIATE): what it reads stays true.

        Raises: as `connection`; whatever the body raised, after rolling back.
        """
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT, such as one on a full disk, may have rolled back already.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _run(connection: sqlite3.Connection, script: str) -> None:
    """The statements of a script, one after the other: `executescript` would end the transaction."""
    for statement in script.split(";"):
        connection.execute(statement)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into fedmesh's."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise FedmeshError(
                Code.STORE_FULL, f"the disk of {path} is full: nothing was recorded; make room on it"
            ) from error
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"cannot use {path}: {error}") from error
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        raise FedmeshError(
            Code.CONFIG_INVALID, f"{path} is damaged ({error}): restore it from a backup, never delete it"
        ) from error
