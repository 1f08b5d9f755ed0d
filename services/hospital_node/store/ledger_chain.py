"""The chain under the ledger's tables, and its head in a second file.

Every reservation, charge and release is an entry that commits to all entries before it by SHA-256. The tables must be
what the entries say, so a row that was altered, added or removed is noticed when the ledger is opened. The newest head
is also kept in a file of its own, written after the ledger's commit and before anything is sent: a ledger that was
deleted, or restored from an old copy, is behind that head. A crash between the two leaves the ledger ahead, which is
in order.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.store.sqlite import Database
from services.privacy.chain import RECOVERED, RELEASED, RESERVED, TERMS, Entry, Head, next_entry
from services.transparency.canonical import parse_canonical

HEAD_FILE: Final = "ledger-head.sqlite"
ENTRIES: Final = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY CHECK (seq > 0),
    body BLOB NOT NULL,
    sha256 TEXT NOT NULL
) STRICT
"""
# recovered_at: of a job from before the ledger was lost and built again; it counts from then on, and goes no further.
RECOVERIES: Final = """
ALTER TABLE reservations ADD COLUMN recovered_at TEXT;
CREATE TABLE recoveries (
    at TEXT NOT NULL,
    basis TEXT NOT NULL,
    epsilon REAL NOT NULL CHECK (epsilon >= 0),
    delta REAL NOT NULL CHECK (delta >= 0)
) STRICT
"""
_HEAD_SCHEMA: Final = """
CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    seq INTEGER NOT NULL CHECK (seq > 0),
    sha256 TEXT NOT NULL
) STRICT
"""


class Chain:
    """The entries in a ledger's database, as one connection sees them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def head(self) -> Head:
        row = self._connection.execute("SELECT seq, sha256 FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return Head() if row is None else Head(*row)

    def newest(self) -> dict[str, Any] | None:
        """What the newest entry says."""
        row = self._connection.execute("SELECT body FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return None if row is None else parse_canonical(row[0])

    def append(self, kind: str, at: str, **facts: object) -> Head:
        entry = next_entry(self.head(), kind, at, **facts)
        entry.read()  # or it would be found damaged at the next start
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.seq, entry.body, entry.sha256))
        return entry.head

    def after(self, seq: int) -> Iterator[Entry]:
        """The entries above a number, oldest first."""
        rows = self._connection.execute("SELECT seq, body, sha256 FROM entries WHERE seq > ? ORDER BY seq", (seq,))
        return (Entry(*row) for row in rows)

    def has(self, head: Head) -> bool:
        """Whether a head, such as one that was kept elsewhere, is one of this chain's."""
        if head == Head():
            return True
        row = self._connection.execute("SELECT sha256 FROM entries WHERE seq = ?", (head.seq,)).fetchone()
        return row is not None and row[0] == head.sha256

    def verify(self) -> None:
        """Check the hashes of all entries, and that the tables are what they say.

        Raises: ValueError saying what does not fit.
        """
        reservations, charges, recoveries = self._replay()
        columns = ", ".join((*TERMS, "reserved_at", "coalesce(released_at, '')", "coalesce(recovered_at, '')"))
        found = {row[0]: row for row in self._connection.execute(f"SELECT {columns} FROM reservations")}  # noqa: S608
        if found != {job_id: tuple(values) for job_id, values in reservations.items()}:
            raise ValueError("its reservations are not those of its entries")
        rows = self._connection.execute("SELECT job_id, round, attempt, measured, charged_at FROM charges")
        if set(rows) != charges:
            raise ValueError("its charges are not those of its entries")
        if (
            list(self._connection.execute("SELECT at, basis, epsilon, delta FROM recoveries ORDER BY rowid"))
            != recoveries
        ):
            raise ValueError("its recoveries are not those of its entries")

    def _replay(self) -> tuple[dict[str, list[Any]], set[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """The rows of the tables by the entries alone."""
        reservations: dict[str, list[Any]] = {}
        charges: set[tuple[Any, ...]] = set()
        recoveries: list[tuple[Any, ...]] = []
        head = Head()
        for entry in self.after(0):
            if not entry.follows(head):
                raise ValueError(f"entry {entry.seq} does not follow from the ones before")
            head, said = entry.head, entry.read()
            if said["kind"] == RESERVED:
                reservations[said["job_id"]] = [*(said[name] for name in TERMS), said["at"], "", ""]
            elif said["kind"] == RELEASED:
                reservations[said["job_id"]][-2] = said["at"]
            elif said["kind"] == RECOVERED:
                recoveries.append((said["at"], said["basis"], said["epsilon"], said["delta"]))
                for row in reservations.values():
                    row[-1] = said["at"]
            else:
                charges.add((said["job_id"], said["round"], said["attempt"], int(said["measured"]), said["at"]))
        return reservations, charges, recoveries


class KeptHead:
    """The newest head in a file beside the ledger. Safe for threads and processes."""

    def __init__(self, data_dir: Path) -> None:
        """Raises: FedmeshError(CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE)."""
        self._database = Database(data_dir / HEAD_FILE, _HEAD_SCHEMA, 1)

    def read(self) -> Head:
        with self._database.connection() as connection:
            row = connection.execute("SELECT seq, sha256 FROM head").fetchone()
        return Head() if row is None else Head(*row)

    def advance(self, head: Head) -> None:
        """Remember a head unless a newer one is remembered; durable on return."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO head VALUES (1, ?1, ?2) ON CONFLICT DO UPDATE SET seq = ?1, sha256 = ?2 WHERE seq < ?1",
                (head.seq, head.sha256),
            )

    def close(self) -> None:
        """See `Database.close`."""
        self._database.close()


def require_whole(chain: Chain, kept: Head, path: Path) -> None:
    """Check that a ledger is not behind a head that was kept elsewhere.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    if chain.has(kept):
        return
    head = chain.head()
    raise FedmeshError(
        Code.CONFIG_INVALID,
        f"the privacy ledger {path.name} is not the one that was used last: it ends with entry {head.seq}, and entry"
        f" {kept.seq} was written ({kept.sha256[:16]}). It was deleted, damaged or restored from an old copy, so what"
        " has been spent is not known and nothing is spent: put the newest copy back, never delete one",
    )
