"""The hospital's own privacy ledger: what was set aside for jobs, and which attempts were paid for.

The ledger is keyed on the population, never on a file, so a refreshed extract inherits what was spent. A job's whole
epsilon is set aside when the job is taken and is never given back once a single attempt was charged: nobody's word that
a round was aborted proves that its sum was not opened.
"""

import json
import sqlite3
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.sqlite import Database, sqlite_errors
from services.privacy.budget import Charge, Limit, remaining, require_attempt, require_budget

LEDGER_FILE: Final = "ledger.sqlite"
_VERSION: Final = 1
# Columns of `reservations` that are the fields of a Reservation.
_TERMS: Final = (
    "job_id",
    "plan_id",
    "population",
    "private",
    "epsilon",
    "delta",
    "colluders",
    "compositions",
    "metrics_compositions",
    "cohort",
    "data_sha256",
)
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

    charged: attempts paid for; compositions: the most that may be, and what the noise was calibrated for.
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


class SqliteLedger:
    """The ledger in `data_dir`; see `domain.ports.Ledger` for the contract. Safe for threads and processes."""

    def __init__(self, data_dir: Path, clock: Clock, limit: Limit) -> None:
        """Open or make it. `limit`: what one population may lose in the rolling window of `services.privacy.budget`.

        Raises: FedmeshError(CONFIG_INVALID, STORE_FULL, STORE_UNAVAILABLE).
        """
        self._clock = clock
        self._limit = limit
        self._database = Database(data_dir / LEDGER_FILE, _SCHEMA, _VERSION)

    def reserve(self, reservation: Reservation) -> None:
        with self._database.transaction() as connection:
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
        with self._database.transaction() as connection:
            self._require_room(connection, attempt, measured)
            connection.execute(
                "INSERT INTO charges VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (attempt.job_id, attempt.round, attempt.attempt, measured, self._clock.now().isoformat()),
            )

    def charged(self, attempt: AttemptId) -> bool:
        with self._database.connection() as connection:
            return _is_charged(connection, attempt)

    def release(self, job_id: str) -> bool:
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE reservations SET released_at = ? WHERE job_id = ? AND released_at IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM charges WHERE charges.job_id = reservations.job_id)",
                (self._clock.now().isoformat(), job_id),
            )
            return changed.rowcount == 1

    def left(self, population: str) -> float:
        """Epsilon that a population may still lose now."""
        with self._database.connection() as connection:
            return remaining(self._counted(connection), population, self._clock.now(), self._limit).epsilon

    def _require_room(self, connection: sqlite3.Connection, attempt: AttemptId, measured: bool) -> None:
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
            now = self._clock.now()
            charge = Charge(asked.job_id, asked.population, asked.epsilon, asked.delta, now)
            require_budget(self._counted(connection), charge, now, self._limit)

    def _counted(self, connection: sqlite3.Connection) -> list[Charge]:
        """All that may count: a job in full, dated by its last charge; a job that may still begin, dated now."""
        rows = connection.execute(
            "SELECT job_id, population, epsilon, delta,"
            " (SELECT max(charged_at) FROM charges AS c WHERE c.job_id = r.job_id)"
            " FROM reservations AS r WHERE private AND released_at IS NULL"
        )
        now = self._clock.now()
        return [
            Charge(job_id, population, epsilon, delta, now if last is None else datetime.fromisoformat(last))
            for job_id, population, epsilon, delta, last in rows
        ]

    def _insert(self, connection: sqlite3.Connection, reservation: Reservation) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                reservation.job_id,
                reservation.plan_id,
                reservation.population,
                reservation.private,
                reservation.epsilon,
                reservation.delta,
                reservation.colluders,
                reservation.compositions,
                reservation.metrics_compositions,
                json.dumps(reservation.cohort),
                reservation.data_sha256,
                self._clock.now().isoformat(),
            ),
        )


def read_ledger(data_dir: Path) -> list[LedgerRow]:
    """All jobs in a node's ledger, oldest first; also while the node runs, and changes nothing.

    Raises: FedmeshError(NOT_FOUND) when there is no ledger; STORE_UNAVAILABLE; CONFIG_INVALID when it is damaged.
    """
    path = data_dir / LEDGER_FILE
    if not path.is_file():
        raise FedmeshError(Code.NOT_FOUND, f"there is no privacy ledger in {data_dir}")
    with sqlite_errors(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)
        try:
            rows = connection.execute(
                "SELECT r.job_id, plan_id, population, private, epsilon, delta, colluders, compositions,"
                " count(c.job_id), reserved_at, max(charged_at), released_at IS NOT NULL"
                " FROM reservations AS r LEFT JOIN charges AS c USING (job_id)"
                " GROUP BY r.job_id ORDER BY reserved_at, r.job_id"
            ).fetchall()
        finally:
            connection.close()
    return [_row(row) for row in rows]


def _row(row: tuple[object, ...]) -> LedgerRow:
    job_id, plan_id, population, private, epsilon, delta, colluders, compositions, charged, reserved, last, free = row
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
    )


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
