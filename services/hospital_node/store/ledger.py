"""The hospital's own privacy ledger: what was set aside for jobs, and which attempts were paid for.

The ledger is keyed on the population, never on a file, so a refreshed extract inherits what was spent. A job's whole
epsilon is set aside when the job is taken and is never given back once a single attempt was charged: nobody's word that
a round was aborted proves that its sum was not opened.

Time in the ledger never runs backwards: what is written is dated at least like the newest entry, so a clock that was
set back makes no charge look older than it is, and opens no window early.
"""

import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger_chain import ENTRIES, RECOVERIES, Chain, KeptHead, require_whole
from services.hospital_node.store.sqlite import Database, sqlite_errors
from services.privacy.budget import Charge, Limit, remaining, require_attempt, require_budget
from services.privacy.chain import CHARGED, RELEASED, RESERVED, TERMS, Entry, Head

LEDGER_FILE: Final = "ledger.sqlite"
_VERSION: Final = 3
# Columns of `reservations` that are the fields of a Reservation.
_TERMS: Final = (*TERMS, "cohort", "data_sha256")
_MOST_UNUSED: Final = 1000
_SCHEMA: Final = """
CREATE TABLE reservations (
    job_id TEXT PRIMARY KEY,
    plan_id TEXT NOT NULL,
    population TEXT NOT NULL,
    private INTEGER NOT NULL CHECK (private IN (0, 1)),
    epsilon REAL NOT NULL CHECK (epsilon >= 0),
    delta REAL NOT NULL CHECK (delta >= 0),
    colluders INTEGER NOT NULL CHECK (colluders >= 0),
    compositions INTEGER NOT NULL CHECK (compositions > 0),
    metrics_compositions INTEGER NOT NULL CHECK (metrics_compositions >= 0),
    cohort TEXT NOT NULL,
    data_sha256 TEXT NOT NULL,
    reserved_at TEXT NOT NULL,
    released_at TEXT
) STRICT;
CREATE INDEX reservations_population ON reservations (population);
CREATE TABLE charges (
    job_id TEXT NOT NULL REFERENCES reservations (job_id),
    round INTEGER NOT NULL CHECK (round > 0),
    attempt INTEGER NOT NULL CHECK (attempt > 0),
    measured INTEGER NOT NULL CHECK (measured IN (0, 1)),
    charged_at TEXT NOT NULL,
    PRIMARY KEY (job_id, round, attempt)
) STRICT, WITHOUT ROWID
"""


@dataclass(frozen=True)
class LedgerRow:
    """One job in the ledger. Epsilon counts against the population from the reservation on, unless `released`.

    charged: attempts paid for; compositions: the most that may be, and what the noise was calibrated for. recovered_at:
    of a job from before the ledger was lost and recovered, which counts from then on and goes no further.
    """

    job_id: str
    plan_id: str
    population: str
    private: bool
    epsilon: float
    delta: float
    colluders: int
    compositions: int
    charged: int
    reserved_at: datetime
    last_charged_at: datetime | None
    released: bool
    recovered_at: datetime | None = None


def open_database(path: Path) -> Database:
    """The file of a ledger, made or brought up to date. Raises: as `Database`."""
    return Database(path, f"{_SCHEMA};{ENTRIES};{RECOVERIES}", _VERSION, {1: ENTRIES, 2: RECOVERIES})


class SqliteLedger:
    """The ledger in `data_dir`; see `domain.ports.Ledger` for the contract. Safe for threads and processes."""

    def __init__(self, data_dir: Path, clock: Clock, limit: Limit) -> None:
        """Open or make it. `limit`: what one population may lose in the rolling window of `services.privacy.budget`.

        Raises: FedmeshError(CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE).
        """
        self._clock = clock
        self._limit = limit
        self._path = data_dir / LEDGER_FILE
        self._database = open_database(self._path)
        self._kept = KeptHead(data_dir)
        self._verify()

    def reserve(self, reservation: Reservation) -> None:
        with self._writing() as connection:
            _require_open(connection, reservation.job_id)
            known = _reservation(connection, reservation.job_id)
            if known is not None:
                _require_same(known, reservation)
                return
            self._require_budget(connection, reservation)
            self._insert(connection, reservation)

    def require_room(self, attempt: AttemptId, *, measured: bool) -> None:
        with self._database.connection() as connection:
            self._require_room(connection, attempt, measured)

    def charge(self, attempt: AttemptId, *, measured: bool) -> None:
        with self._writing() as connection:
            self._require_room(connection, attempt, measured)
            if _is_charged(connection, attempt):
                return
            row = (attempt.job_id, attempt.round, attempt.attempt, int(measured), self._now(connection).isoformat())
            connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?)", row)
            Chain(connection).append(
                CHARGED,
                row[-1],
                job_id=attempt.job_id,
                round=attempt.round,
                attempt=attempt.attempt,
                measured=int(measured),
            )

    def charged(self, attempt: AttemptId) -> bool:
        with self._database.connection() as connection:
            return _is_charged(connection, attempt)

    def unused(self) -> list[str]:
        with self._database.connection() as connection:
            rows = connection.execute(
                "SELECT job_id FROM reservations AS r WHERE released_at IS NULL AND recovered_at IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM charges AS c WHERE c.job_id = r.job_id) ORDER BY reserved_at LIMIT ?",
                (_MOST_UNUSED,),
            )
            return [str(job_id) for (job_id,) in rows]

    def release(self, job_id: str) -> bool:
        with self._writing() as connection:
            at = self._now(connection).isoformat()
            changed = connection.execute(
                "UPDATE reservations SET released_at = ?"
                " WHERE job_id = ? AND released_at IS NULL AND recovered_at IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM charges WHERE charges.job_id = reservations.job_id)",
                (at, job_id),
            )
            if changed.rowcount == 1:
                Chain(connection).append(RELEASED, at, job_id=job_id)
            return changed.rowcount == 1

    def left(self, population: str) -> float:
        """Epsilon that a population may still lose now."""
        with self._database.connection() as connection:
            counted = self._counted(connection, population)
            return remaining(counted, population, self._now(connection), self._limit).epsilon

    def head(self) -> Head:
        with self._database.connection() as connection:
            return Chain(connection).head()

    def has(self, head: Head) -> bool:
        with self._database.connection() as connection:
            return Chain(connection).has(head)

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        with self._database.connection() as connection:
            return list(itertools.islice(Chain(connection).after(seq), limit))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction on a whole ledger, whose new head is in its second place when the block has ended."""
        with self._database.transaction() as connection:
            chain, kept = Chain(connection), self._kept.read()
            require_whole(chain, kept, self._path)
            yield connection
            head = chain.head()
        if head != kept:
            self._kept.advance(head)

    def _verify(self) -> None:
        """Check the ledger against its chain and its kept head; give one from before there was a chain its entries.

        Raises: FedmeshError(CONFIG_INVALID).
        """
        with self._writing() as connection:
            chain = Chain(connection)
            if chain.head() == Head():
                _adopt(connection, chain)
            try:
                chain.verify()
            except (ValueError, KeyError) as error:
                raise FedmeshError(
                    Code.CONFIG_INVALID,
                    f"the privacy ledger {self._path.name} is damaged or was altered ({error}), so what has been spent"
                    " is not known and nothing is spent: put the newest copy back, never delete one",
                ) from error

    def _now(self, connection: sqlite3.Connection) -> datetime:
        """The time, but never before the newest entry's."""
        now, newest = self._clock.now(), Chain(connection).newest()
        return now if newest is None else max(now, datetime.fromisoformat(newest["at"]))

    def _require_room(self, connection: sqlite3.Connection, attempt: AttemptId, measured: bool) -> None:
        _require_open(connection, attempt.job_id)
        reservation = _reservation(connection, attempt.job_id)
        if reservation is None:
            raise FedmeshError(
                Code.PRIVACY_REFUSED, f"job {attempt.job_id} has no reservation in the ledger", job=attempt.job_id
            )
        if not reservation.private or _is_charged(connection, attempt):
            return
        # The job's epsilon may have left the window since its last charge.
        self._require_budget(connection, reservation)
        charged, with_metrics = connection.execute(
            "SELECT count(*), coalesce(sum(measured), 0) FROM charges WHERE job_id = ?", (attempt.job_id,)
        ).fetchone()
        _require_attempt(reservation, charged, reservation.compositions, "attempts")
        if measured:
            _require_attempt(reservation, with_metrics, reservation.metrics_compositions, "attempts with metrics")

    def _require_budget(self, connection: sqlite3.Connection, asked: Reservation) -> None:
        if asked.private:
            now = self._now(connection)
            charge = Charge(asked.job_id, asked.population, asked.epsilon, asked.delta, now)
            require_budget(self._counted(connection, asked.population), charge, now, self._limit)

    def _counted(self, connection: sqlite3.Connection, population: str) -> list[Charge]:
        """All that may count against a population: a job in full, dated by its last charge; a job that may still begin,
        dated now; what is from before the ledger was lost, dated by its recovery."""
        rows = connection.execute(
            "SELECT job_id, population, epsilon, delta,"
            " coalesce(recovered_at, (SELECT max(charged_at) FROM charges AS c WHERE c.job_id = r.job_id))"
            " FROM reservations AS r WHERE private AND released_at IS NULL AND population = ?1"
            # Nobody knows of which population it was.
            " UNION ALL SELECT 'recovery ' || rowid, ?1, epsilon, delta, at FROM recoveries",
            (population,),
        )
        now = self._now(connection)
        return [
            Charge(job_id, of, epsilon, delta, now if last is None else datetime.fromisoformat(last))
            for job_id, of, epsilon, delta, last in rows
        ]

    def _insert(self, connection: sqlite3.Connection, reservation: Reservation) -> None:
        at = self._now(connection).isoformat()
        terms = {name: getattr(reservation, name) for name in TERMS} | {"private": int(reservation.private)}
        connection.execute(
            "INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
            (*terms.values(), json.dumps(reservation.cohort), reservation.data_sha256, at),
        )
        Chain(connection).append(RESERVED, at, **terms)


def read_ledger(data_dir: Path) -> list[LedgerRow]:
    """All jobs in a node's ledger, oldest first; also while the node runs, and changes nothing.

    Raises: FedmeshError(NOT_FOUND) when there is no ledger; STORE_UNAVAILABLE; CONFIG_INVALID when it is damaged.
    """
    with _reading(data_dir) as connection:
        rows = connection.execute(
            "SELECT r.job_id, plan_id, population, private, epsilon, delta, colluders, compositions,"
            " count(c.job_id), reserved_at, max(charged_at), released_at IS NOT NULL, recovered_at"
            " FROM reservations AS r LEFT JOIN charges AS c USING (job_id)"
            " GROUP BY r.job_id ORDER BY reserved_at, r.job_id"
        ).fetchall()
    return [_row(row) for row in rows]


def read_recoveries(data_dir: Path) -> list[tuple[float, float, datetime]]:
    """Epsilon, delta and time of each recovery of a node's ledger: what counts against whichever population.

    Raises: as `read_ledger`.
    """
    with _reading(data_dir) as connection:
        rows = connection.execute("SELECT epsilon, delta, at FROM recoveries ORDER BY rowid").fetchall()
    return [(epsilon, delta, datetime.fromisoformat(at)) for epsilon, delta, at in rows]


def read_entries(data_dir: Path) -> list[Entry]:
    """The chain of a node's ledger, oldest entry first. Raises: as `read_ledger`."""
    with _reading(data_dir) as connection:
        return list(Chain(connection).after(0))


@contextmanager
def _reading(data_dir: Path) -> Iterator[sqlite3.Connection]:
    path = data_dir / LEDGER_FILE
    if not path.is_file():
        raise FedmeshError(Code.NOT_FOUND, f"there is no privacy ledger in {data_dir}")
    with (
        sqlite_errors(path),
        closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)) as connection,
    ):
        yield connection


def _row(row: tuple[object, ...]) -> LedgerRow:
    *said, reserved, last, free, recovered = row
    job_id, plan_id, population, private, epsilon, delta, colluders, compositions, charged = said
    return LedgerRow(
        job_id=str(job_id),
        plan_id=str(plan_id),
        population=str(population),
        private=bool(private),
        epsilon=float(str(epsilon)),
        delta=float(str(delta)),
        colluders=int(str(colluders)),
        compositions=int(str(compositions)),
        charged=int(str(charged)),
        reserved_at=datetime.fromisoformat(str(reserved)),
        last_charged_at=None if last is None else datetime.fromisoformat(str(last)),
        released=bool(free),
        recovered_at=None if recovered is None else datetime.fromisoformat(str(recovered)),
    )


def _adopt(connection: sqlite3.Connection, chain: Chain) -> None:
    """Entries for the rows of a ledger from before there was a chain, in the order in which they were written."""
    columns = ", ".join((*TERMS, "reserved_at", "released_at"))
    written: list[tuple[str, str, dict[str, object]]] = []
    reserved_at: dict[str, str] = {}
    for row in connection.execute(f"SELECT {columns} FROM reservations").fetchall():  # noqa: S608
        *terms, reserved, released = row
        reserved_at[row[0]] = reserved
        if released is not None and released < reserved:
            released = reserved
            connection.execute("UPDATE reservations SET released_at = ? WHERE job_id = ?", (released, row[0]))
        written.append((reserved, RESERVED, dict(zip(TERMS, terms, strict=True))))
        written += [(released, RELEASED, {"job_id": row[0]})] if released is not None else []
    for job_id, number, attempt, measured, at in connection.execute("SELECT * FROM charges").fetchall():
        # A clock that was set back dated it before its reservation.
        if at < reserved_at[job_id]:
            at = reserved_at[job_id]
            connection.execute(
                "UPDATE charges SET charged_at = ? WHERE job_id = ? AND round = ? AND attempt = ?",
                (at, job_id, number, attempt),
            )
        facts = {"job_id": job_id, "round": number, "attempt": attempt, "measured": measured}
        written.append((at, CHARGED, facts))
    # A reservation comes before what follows from it, also within one moment.
    order = (RESERVED, CHARGED, RELEASED)
    for at, kind, facts in sorted(written, key=lambda item: (item[0], order.index(item[1]))):
        chain.append(kind, at, **facts)


def _reservation(connection: sqlite3.Connection, job_id: str) -> Reservation | None:
    """A job's reservation, unless there is none or it was given back."""
    row = connection.execute(
        f"SELECT {', '.join(_TERMS)} FROM reservations WHERE job_id = ? AND released_at IS NULL",  # noqa: S608
        (job_id,),
    ).fetchone()
    if row is None:
        return None
    terms = dict(zip(_TERMS, row, strict=True))
    return Reservation(**{**terms, "private": bool(terms["private"]), "cohort": tuple(json.loads(terms["cohort"]))})


def _require_open(connection: sqlite3.Connection, job_id: str) -> None:
    """Raises: FedmeshError(PRIVACY_REFUSED) for a job from before the ledger was lost: nobody knows what was sent of it
    after its last reported charge."""
    found = connection.execute(
        "SELECT recovered_at FROM reservations WHERE job_id = ? AND recovered_at IS NOT NULL", (job_id,)
    ).fetchone()
    if found is not None:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"job {job_id} was taken before this hospital's ledger was lost and recovered ({found[0]}): it goes no"
            " further here; start another job",
            job=job_id,
        )


def _require_same(known: Reservation, asked: Reservation) -> None:
    if known.data_sha256 != asked.data_sha256:
        raise FedmeshError(
            Code.DATA_INVALID,
            f"the data of population {asked.population} changed while job {asked.job_id} runs: a job sees one snapshot;"
            " put the old file back, or start a new job",
            job=asked.job_id,
        )
    changed = [name for name in _TERMS if getattr(known, name) != getattr(asked, name)]
    if changed:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"job {asked.job_id} now asks for other terms than it was taken with: {', '.join(changed)}",
            job=asked.job_id,
        )


def _is_charged(connection: sqlite3.Connection, attempt: AttemptId) -> bool:
    found = connection.execute(
        "SELECT 1 FROM charges WHERE job_id = ? AND round = ? AND attempt = ?",
        (attempt.job_id, attempt.round, attempt.attempt),
    )
    return found.fetchone() is not None


def _require_attempt(reservation: Reservation, used: int, allowed: int, what: str) -> None:
    try:
        require_attempt(reservation.job_id, used, allowed)
    except FedmeshError as error:
        raise FedmeshError(
            error.code,
            f"job {reservation.job_id} asks one more of population {reservation.population}, but its noise was"
            f" calibrated for {allowed} {what}: 0 are left",
            job_id=reservation.job_id,
            population=reservation.population,
            asked=1,
            left=0,
        ) from error
