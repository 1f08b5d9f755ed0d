"""What the node has seen of the audit log: the checkpoint that it holds, and the evidence that it keeps."""

import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.witness_ports import Held, Refusal, RefusalKind
from services.hospital_node.store.sqlite import Database, sqlite_errors

STATE_FILE: Final = "state.sqlite"
SINCE_3: Final = """
CREATE TABLE held_checkpoints (
    log TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    root BLOB NOT NULL,
    note TEXT NOT NULL,
    cosigned INTEGER NOT NULL CHECK (cosigned IN (0, 1))
) STRICT, WITHOUT ROWID;
CREATE TABLE refusals (
    log TEXT NOT NULL,
    kind TEXT NOT NULL,
    held TEXT NOT NULL,
    seen TEXT NOT NULL,
    reason TEXT NOT NULL,
    at TEXT NOT NULL,
    PRIMARY KEY (log, kind, held)
) STRICT, WITHOUT ROWID
"""
_HELD: Final = "SELECT size, root, note, cosigned FROM held_checkpoints WHERE log = ?"
# A log that goes wrong again and again must not fill the disk of its witness.
MOST_REFUSALS: Final = 100
_REFUSALS: Final = "SELECT log, kind, held, seen, reason, at FROM refusals"


class WitnessStore:
    """See `domain.witness_ports.WitnessMemory` for the contract."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def held(self, log: str) -> Held | None:
        with self._database.connection() as connection:
            return _held(connection, log)

    def hold(self, log: str, before: Held | None, now: Held) -> None:
        with self._database.transaction() as connection:
            if _held(connection, log) != before:
                raise FedmeshError(Code.LOST_RACE, "another look at the log came in between")
            connection.execute(
                "INSERT OR REPLACE INTO held_checkpoints VALUES (?, ?, ?, ?, ?)",
                (log, now.size, now.root, now.note, int(now.cosigned)),
            )

    def mark_cosigned(self, log: str, size: int) -> None:
        with self._database.transaction() as connection:
            connection.execute("UPDATE held_checkpoints SET cosigned = 1 WHERE log = ? AND size = ?", (log, size))

    def keep_evidence(self, refusal: Refusal) -> tuple[Refusal, bool]:
        # A log that went wrong goes on: its first wrong checkpoint says it all, and the disk is not filled with others.
        key = (refusal.log, refusal.kind.value, refusal.held)
        values = (*key, refusal.seen, refusal.reason, refusal.at.isoformat())
        with self._database.transaction() as connection:
            row = connection.execute(f"{_REFUSALS} WHERE log = ? AND kind = ? AND held = ?", key).fetchone()
            if row is not None:
                return _refusal(row), False
            (known,) = connection.execute("SELECT count(*) FROM refusals WHERE log = ?", (refusal.log,)).fetchone()
            if known >= MOST_REFUSALS:
                return refusal, False
            connection.execute("INSERT INTO refusals VALUES (?, ?, ?, ?, ?, ?)", values)
            return refusal, True


def read_witness(data_dir: Path) -> tuple[dict[str, Held], list[Refusal]]:
    """What a node holds by log, and its evidence, oldest first; also while the node runs, and changes nothing.

    Raises: FedmeshError(NOT_FOUND) when no node of this release ever ran there; STORE_UNAVAILABLE; CONFIG_INVALID when
        the file is damaged.
    """
    path = data_dir / STATE_FILE
    if not path.is_file():
        raise FedmeshError(Code.NOT_FOUND, f"no hospital node ever ran on {data_dir}")
    with sqlite_errors(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)
        try:
            if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'refusals'").fetchone():
                raise FedmeshError(Code.NOT_FOUND, f"the node on {data_dir} is of a release without witnesses")
            logs = [str(row[0]) for row in connection.execute("SELECT log FROM held_checkpoints ORDER BY log")]
            held = {log: found for log in logs if (found := _held(connection, log)) is not None}
            rows = connection.execute(f"{_REFUSALS} ORDER BY at").fetchall()
        finally:
            connection.close()
    return held, [_refusal(row) for row in rows]


def _refusal(row: tuple[str, ...]) -> Refusal:
    log, kind, held, seen, reason, at = row
    return Refusal(log, RefusalKind(kind), held, seen, reason, datetime.fromisoformat(at))


def _held(connection: sqlite3.Connection, log: str) -> Held | None:
    row = connection.execute(_HELD, (log,)).fetchone()
    return None if row is None else Held(int(row[0]), bytes(row[1]), str(row[2]), bool(row[3]))
