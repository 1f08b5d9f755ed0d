"""Building a ledger that was lost from entries that somebody else kept, and putting it into its place.

It is built beside the place, told to the registry, and only then moved there: until then nothing has changed, and
whoever is interrupted afterwards finishes what was told.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.store.ledger import LEDGER_FILE, open_database, read_entries
from services.hospital_node.store.ledger_chain import HEAD_FILE, Chain, KeptHead
from services.privacy.chain import CHARGED, RECOVERED, RELEASED, RESERVED, TERMS, Entry, Head
from services.privacy.recovery import Recovery

_FOLDER: Final = "ledger.recovering"


class SqliteLostLedger:
    """See `domain.recovery_ports.LostLedger` for the contract."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / _FOLDER

    def require_lost(self) -> None:
        path = self._data_dir / LEDGER_FILE
        if not path.exists():
            return
        try:
            entries = len(read_entries(self._data_dir))
        except FedmeshError as error:
            raise FedmeshError(
                Code.WRONG_STATE,
                f"there is a ledger that cannot be read ({error.message}): put the newest copy back; where there is"
                f" none, move {path}* to a safe place and run this again",
            ) from error
        if entries:
            raise FedmeshError(
                Code.WRONG_STATE,
                f"there is a ledger with {entries} entries in {self._data_dir}: nothing is recovered over it. Where the"
                f" node refuses it as an old copy and there is no newer one, move {path}* to a safe place and run this"
                " again",
            )

    def kept_head(self) -> Head:
        if not (self._data_dir / HEAD_FILE).exists():
            return Head()
        kept = KeptHead(self._data_dir)
        try:
            return kept.read()
        finally:
            kept.close()

    def build(self, entries: Sequence[Entry], recovery: Recovery, now: datetime) -> Entry:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        database, kept = open_database(self._folder / LEDGER_FILE), KeptHead(self._folder)
        try:
            with database.transaction() as connection:
                for entry in entries:
                    _append(connection, entry)
                last = _close_with(Chain(connection), recovery, now)
                _apply(connection, last.read())
                Chain(connection).verify()
            kept.advance(last.head)
        except (ValueError, KeyError, sqlite3.IntegrityError) as error:
            raise FedmeshError(Code.STATEMENT_INVALID, f"the entries are no ledger: {error}") from error
        finally:
            database.close()
            kept.close()
        return last

    def built(self) -> Entry | None:
        try:
            entries = read_entries(self._folder)
        except FedmeshError:
            # Interrupted while it was built: nobody was told of it.
            return None
        return entries[-1] if entries else None

    def install(self) -> None:
        # The head of before may be one that the new ledger does not have; without one it is made again.
        _delete(self._data_dir.glob(f"{HEAD_FILE}*"))
        _delete(self._data_dir.glob(f"{LEDGER_FILE}*"))
        os.replace(self._folder / LEDGER_FILE, self._data_dir / LEDGER_FILE)
        os.replace(self._folder / HEAD_FILE, self._data_dir / HEAD_FILE)
        descriptor = os.open(self._data_dir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        shutil.rmtree(self._folder)


def _close_with(chain: Chain, recovery: Recovery, now: datetime) -> Entry:
    """Append the entry of the recovery, dated no earlier than the one before."""
    newest, before = chain.newest(), chain.head()
    at = now if newest is None else max(now, datetime.fromisoformat(newest["at"]))
    facts = {"basis": recovery.basis.value, "epsilon": recovery.epsilon, "delta": recovery.delta}
    chain.append(RECOVERED, at.isoformat(), **facts)
    (last,) = chain.after(before.seq)
    return last


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def _append(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.seq, entry.body, entry.sha256))
    _apply(connection, entry.read())


def _apply(connection: sqlite3.Connection, said: dict[str, Any]) -> None:
    """What an entry says, in the tables."""
    kind, at = said["kind"], said["at"]
    if kind == RESERVED:
        # Cohort and data were never reported; a job from before goes no further, so that nobody asks for them.
        terms = [said[name] for name in TERMS]
        connection.execute(
            "INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '[]', '', ?, NULL, NULL)",
            (*terms, at),
        )
    elif kind == CHARGED:
        charge = (said["job_id"], said["round"], said["attempt"], said["measured"], at)
        connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?)", charge)
    elif kind == RELEASED:
        connection.execute("UPDATE reservations SET released_at = ? WHERE job_id = ?", (at, said["job_id"]))
    else:
        row = (at, said["basis"], said["epsilon"], said["delta"])
        connection.execute("INSERT INTO recoveries VALUES (?, ?, ?, ?)", row)
        connection.execute("UPDATE reservations SET recovered_at = ?", (at,))
