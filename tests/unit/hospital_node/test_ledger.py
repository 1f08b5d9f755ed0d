"""The hospital's privacy ledger: never more than the limit, never a charge twice, never half a record."""

import multiprocessing
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import LEDGER_FILE, SqliteLedger, read_ledger
from services.privacy.budget import Limit

LIMIT = Limit(epsilon=0.5, delta=1e-5)


def reservation(job: str, epsilon: float = 0.5, **changes: Any) -> Reservation:
    terms: dict[str, Any] = {
        "job_id": job,
        "plan_id": "a" * 64,
        "population": "north",
        "private": True,
        "epsilon": epsilon,
        "delta": 1e-6,
        "colluders": 1,
        "compositions": 3,
        "metrics_compositions": 2,
        "cohort": ("h1", "h2", "h3", "h4"),
        "data_sha256": "d" * 64,
    }
    return Reservation(**{**terms, **changes})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: FakeClock) -> SqliteLedger:
    return SqliteLedger(tmp_path, clock, LIMIT)


def refused(code: Code, function: Any, *args: Any, **kwargs: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        function(*args, **kwargs)
    assert caught.value.code is code
    return caught.value


def test_second_job_beyond_the_limit_is_refused_and_says_what_is_left(ledger: SqliteLedger) -> None:
    ledger.reserve(reservation("one", 0.3))
    error = refused(Code.BUDGET_EXHAUSTED, ledger.reserve, reservation("two", 0.3))
    for part in ("two", "north", "0.3", "0.2"):
        assert part in error.message
    ledger.reserve(reservation("three", 0.2))
    ledger.reserve(reservation("other", 0.5, population="south"))
    assert ledger.left("north") == 0


def test_reserving_again_is_harmless_and_other_terms_are_refused(ledger: SqliteLedger) -> None:
    ledger.reserve(reservation("one"))
    ledger.reserve(reservation("one"))
    assert "data" in refused(Code.DATA_INVALID, ledger.reserve, reservation("one", data_sha256="e" * 64)).message
    error = refused(Code.PRIVACY_REFUSED, ledger.reserve, reservation("one", cohort=("h1", "h2", "h3", "h5")))
    assert "cohort" in error.message
    refused(Code.PRIVACY_REFUSED, ledger.reserve, reservation("one", compositions=30))


def test_charges_end_with_the_compositions_of_the_noise(ledger: SqliteLedger) -> None:
    ledger.reserve(reservation("one"))
    for number in (1, 2, 3):
        ledger.charge(AttemptId("one", 1, number), measured=False)
        ledger.charge(AttemptId("one", 1, number), measured=False)
    error = refused(Code.BUDGET_EXHAUSTED, ledger.charge, AttemptId("one", 2, 1), measured=False)
    assert "one" in error.message
    assert "north" in error.message
    assert read_ledger(ledger._database.path.parent)[0].charged == 3


def test_attempts_with_metrics_have_a_limit_of_their_own(ledger: SqliteLedger) -> None:
    ledger.reserve(reservation("one"))
    ledger.charge(AttemptId("one", 1, 1), measured=True)
    ledger.charge(AttemptId("one", 1, 2), measured=True)
    refused(Code.BUDGET_EXHAUSTED, ledger.charge, AttemptId("one", 1, 3), measured=True)
    refused(Code.BUDGET_EXHAUSTED, ledger.require_room, AttemptId("one", 1, 3), measured=True)
    ledger.charge(AttemptId("one", 2, 1), measured=False)


def test_only_an_unused_reservation_is_released(ledger: SqliteLedger) -> None:
    ledger.reserve(reservation("unused", 0.2))
    ledger.reserve(reservation("used", 0.3))
    ledger.charge(AttemptId("used", 1, 1), measured=False)
    assert ledger.release("unused")
    assert not ledger.release("used")
    assert not ledger.release("unknown")
    assert ledger.left("north") == pytest.approx(0.2)
    refused(Code.PRIVACY_REFUSED, ledger.charge, AttemptId("unused", 1, 1), measured=False)
    ledger.reserve(reservation("unused", 0.2))
    ledger.charge(AttemptId("unused", 1, 1), measured=False)


def test_budget_returns_a_year_after_the_last_charge_only(ledger: SqliteLedger, clock: FakeClock) -> None:
    ledger.reserve(reservation("one"))
    clock.advance(timedelta(days=300).total_seconds())
    ledger.charge(AttemptId("one", 1, 1), measured=False)
    clock.advance(timedelta(days=364).total_seconds())
    refused(Code.BUDGET_EXHAUSTED, ledger.reserve, reservation("two"))
    clock.advance(timedelta(days=2).total_seconds())
    ledger.reserve(reservation("two"))
    refused(Code.BUDGET_EXHAUSTED, ledger.charge, AttemptId("one", 1, 2), measured=False)


def test_a_reservation_never_expires_by_itself(ledger: SqliteLedger, clock: FakeClock) -> None:
    ledger.reserve(reservation("one"))
    clock.advance(timedelta(days=1000).total_seconds())
    refused(Code.BUDGET_EXHAUSTED, ledger.reserve, reservation("two"))


def test_plan_without_privacy_costs_nothing_and_is_recorded(ledger: SqliteLedger) -> None:
    free = {"private": False, "epsilon": 0.0, "delta": 0.0, "colluders": 0, "compositions": 1}
    ledger.reserve(reservation("free", **{**free, "epsilon": 0.0}))
    for number in range(1, 5):
        ledger.charge(AttemptId("free", 1, number), measured=True)
    ledger.reserve(reservation("private"))
    rows = {row.job_id: row for row in read_ledger(ledger._database.path.parent)}
    assert (rows["free"].private, rows["free"].charged) == (False, 4)
    assert rows["private"].private


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, clock: FakeClock) -> None:
    SqliteLedger(tmp_path, clock, LIMIT).reserve(reservation("one", 0.01))
    path = tmp_path / LEDGER_FILE
    connect = sqlite3.connect

    class Full(sqlite3.Connection):
        """A connection whose file may not grow: SQLite's own way of having no room."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pages = self.execute("PRAGMA page_count").fetchone()[0]
            self.execute(f"PRAGMA max_page_count = {pages}")

    jobs = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Full, **kwargs))
        ledger = SqliteLedger(tmp_path, clock, LIMIT)
        with pytest.raises(FedmeshError) as caught:  # noqa: PT012 - which one fails is the disk's choice
            for jobs in range(1000):
                ledger.reserve(reservation(f"more-{jobs}", 1e-7, delta=0.0))
    assert caught.value.code is Code.STORE_FULL
    assert "full" in caught.value.message
    assert {row.job_id for row in read_ledger(tmp_path)} == {"one", *(f"more-{number}" for number in range(jobs))}
    # There is room again; the connection that failed is not used any more.
    ledger.reserve(reservation(f"more-{jobs}", 1e-7, delta=0.0))
    assert connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_damaged_or_newer_ledger_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    SqliteLedger(tmp_path, clock, LIMIT)
    with sqlite3.connect(tmp_path / LEDGER_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "99" in refused(Code.CONFIG_INVALID, SqliteLedger, tmp_path, clock, LIMIT).message
    connection.close()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / LEDGER_FILE).write_bytes(b"not a database" * 1000)
    assert "backup" in refused(Code.CONFIG_INVALID, SqliteLedger, damaged, clock, LIMIT).message


def test_reading_a_missing_ledger(tmp_path: Path) -> None:
    refused(Code.NOT_FOUND, read_ledger, tmp_path)


def _reserve_in_process(folder: str, job: str, barrier: Any, results: Any) -> None:
    ledger = SqliteLedger(Path(folder), FakeClock(datetime.now(UTC)), LIMIT)
    barrier.wait()
    try:
        ledger.reserve(reservation(job, 0.3))
        results.put(job)
    except FedmeshError as error:
        results.put(error.code.value)


def test_two_processes_cannot_spend_the_same_budget(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_reserve_in_process, args=(str(tmp_path), job, barrier, results)) for job in ("a", "b")
    ]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    assert len(read_ledger(tmp_path)) == 1
    assert answers[1] == "budget-exhausted"
    assert answers[0] in ("a", "b")


class LedgerMachine(RuleBasedStateMachine):
    """Any order of reserve, charge, release, time and crashes keeps the promises."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.reopen()
        self.charged: dict[str, set[AttemptId]] = {}

    @rule()
    def reopen(self) -> None:
        self.ledger = SqliteLedger(Path(self.folder.name), self.clock, LIMIT)

    @rule(job=st.sampled_from("abcdef"), epsilon=st.sampled_from([0.1, 0.2, 0.25, 0.5]))
    def reserve(self, job: str, epsilon: float) -> None:
        try:
            self.ledger.reserve(reservation(job, epsilon))
        except FedmeshError as error:
            assert error.code in (Code.BUDGET_EXHAUSTED, Code.PRIVACY_REFUSED)  # noqa: PT017

    @rule(job=st.sampled_from("abcdef"), attempt=st.integers(1, 5), measured=st.booleans())
    def charge(self, job: str, attempt: int, measured: bool) -> None:
        name = AttemptId(job, 1, attempt)
        try:
            self.ledger.charge(name, measured=measured)
        except FedmeshError as error:
            assert error.code in (Code.BUDGET_EXHAUSTED, Code.PRIVACY_REFUSED)  # noqa: PT017
        else:
            self.charged.setdefault(job, set()).add(name)

    @rule(job=st.sampled_from("abcdef"))
    def crash_in_charge(self, job: str) -> None:
        """A process that dies before its commit leaves nothing."""
        with (  # noqa: PT012 - the body is the crash
            pytest.raises(KeyboardInterrupt),
            self.ledger._database.transaction() as connection,
        ):
            connection.execute("INSERT OR IGNORE INTO charges SELECT job_id, 9, 9, 0, '' FROM reservations")
            raise KeyboardInterrupt
        self.reopen()

    @rule(job=st.sampled_from("abcdef"))
    def release(self, job: str) -> None:
        assert not (self.ledger.release(job) and self.charged.get(job))

    @rule(days=st.integers(1, 200))
    def wait(self, days: int) -> None:
        self.clock.advance(days * 86400.0)

    @invariant()
    def promises_hold(self) -> None:
        rows = read_ledger(Path(self.folder.name))
        since = self.clock.now() - timedelta(days=365)
        counted = [
            row for row in rows if not row.released and (row.last_charged_at is None or row.last_charged_at > since)
        ]
        assert sum(row.epsilon for row in counted) <= LIMIT.epsilon + 1e-9
        for row in rows:
            assert row.charged == len(self.charged.get(row.job_id, ()))
            assert row.charged <= row.compositions
            assert not (row.released and row.charged)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


LedgerMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestLedger = LedgerMachine.TestCase


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(epsilons=st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=20))
def test_accepted_jobs_never_exceed_the_limit(epsilons: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = SqliteLedger(Path(folder), FakeClock(), Limit(0.5, 1.0 - 1e-9))
        accepted = 0.0
        for number, epsilon in enumerate(epsilons):
            try:
                ledger.reserve(reservation(f"job-{number}", epsilon))
            except FedmeshError:
                assert accepted + epsilon > 0.5 - 1e-7
            else:
                accepted += epsilon
        assert accepted <= 0.5 + 1e-9
