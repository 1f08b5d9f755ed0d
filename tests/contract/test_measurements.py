"""What the measurements promise with native partitions and with TimescaleDB: who sees what, and sums that are right.

The embedded PostgreSQL proves the native form; `make test-timescale DSN=...` runs the same where TimescaleDB is.
"""

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest

from tests.support.measurements import (
    COHORTS,
    JOB_AB,
    JOB_BC,
    TIMESCALE_DSN,
    A,
    B,
    C,
    MeasurementsDatabase,
    native,
    with_timescale,
)

NOW = datetime.now(UTC)
# In this month, for which there is a partition.
NOON = NOW.replace(hour=12, minute=0, second=0, microsecond=0)
VIEWS = ("performance", "performance_by_day")
PARTITIONS = (
    "select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid"
    " where i.inhparent = 'registry.measurements'::regclass order by 1"
)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[MeasurementsDatabase]:
    """In each job a number of the joint model and of each member, three versions on two days.

    Shared: a test that writes uses a name of its own.
    """
    made = with_timescale(TIMESCALE_DSN) if TIMESCALE_DSN else native(request.getfixturevalue("_postgres_process"))
    with made as database:
        database.found()
        for job, cohort in COHORTS.items():
            for version, at in ((1, NOON), (2, NOON + timedelta(hours=1)), (3, NOON + timedelta(days=1))):
                for number, name in enumerate(("", *cohort)):
                    database.measure(name, job, version, 10.0 * version + number, at)
        yield database


def seen(database: MeasurementsDatabase, view: str, **settings: str) -> set[tuple[str, uuid.UUID]]:
    return set(database.rows(f"select hospital_id, job_id from registry.{view}", **settings))


def test_a_hospital_sees_its_own_and_the_joint_numbers_of_its_jobs(measured: MeasurementsDatabase) -> None:
    whole = {(name, job) for job, cohort in COHORTS.items() for name in ("", *cohort)}
    for view in VIEWS:
        assert seen(measured, view, scope="consortium") == whole, view
        assert seen(measured, view, hospital_id=A) == {("", JOB_AB), (A, JOB_AB)}, view
        assert seen(measured, view, hospital_id=C) == {("", JOB_BC), (C, JOB_BC)}, view
        both = {("", JOB_AB), ("", JOB_BC), (B, JOB_AB), (B, JOB_BC)}
        assert seen(measured, view, hospital_id=B) == both, view
        for nobody in ({}, {"hospital_id": ""}, {"scope": "hospital"}, {"hospital_id": "elsewhere"}):
            assert seen(measured, view, **nobody) == set(), (view, nobody)
    joint = "select distinct job_id from registry.metrics"
    assert measured.rows(joint, hospital_id=A) == [(JOB_AB,)]
    assert len(measured.rows(joint, scope="consortium")) == 2
    assert measured.rows(joint) == []


def test_no_condition_sees_past_the_filter(measured: MeasurementsDatabase) -> None:
    # A function that tells what it is given runs on rows that the view lets through, and on no others.
    measured.owner_rows("grant create on schema registry to registry_service")
    with measured.acting(hospital_id=A) as connection:
        connection.execute(
            "create function registry.tell(text) returns boolean language plpgsql cost 0.0000001 as"
            " $$ begin raise notice '%', $1; return true; end $$"
        )
        told: list[str] = []
        connection.add_notice_handler(lambda notice: told.append(notice.message_primary or ""))
        for view in VIEWS:
            connection.execute(f"select count(*) from registry.{view} where registry.tell(hospital_id)".encode())
        assert set(told) == {"", A}


@pytest.mark.parametrize(
    ("hospital", "job"), [("", JOB_AB), (B, JOB_AB), (A, JOB_BC), (C, JOB_BC)], ids=["joint", "other", "no job", "both"]
)
def test_a_hospital_writes_for_itself_only(measured: MeasurementsDatabase, hospital: str, job: uuid.UUID) -> None:
    for settings in ({"hospital_id": A}, {"hospital_id": A, "scope": "hospital"}, {"scope": "hospital"}):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            measured.measure(hospital, job, 9, 1.0, NOON, **settings)
    with measured.acting(hospital_id=A) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(
            "insert into registry.metrics (job_id, version, name, value, recorded_at) values (%s, 9, 'n', 1, now())",
            (job,),
        )


def test_a_hospital_writes_its_own(measured: MeasurementsDatabase) -> None:
    measured.measure(A, JOB_AB, 9, 1.0, NOON, "own", hospital_id=A)
    for view in VIEWS:
        assert len(measured.rows(f"select * from registry.{view} where name = 'own'", hospital_id=A)) == 1
        assert measured.rows(f"select * from registry.{view} where name = 'own'", hospital_id=B) == []


@pytest.mark.parametrize("table", ["measurements", "measurements_by_day", "measurement_policy"])
def test_the_service_reads_no_table_behind_the_views(measured: MeasurementsDatabase, table: str) -> None:
    for settings in ({"hospital_id": A}, {"scope": "consortium"}):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            measured.rows(f"select * from registry.{table}", **settings)


def test_what_holds_the_rows_is_closed_to_the_service(measured: MeasurementsDatabase) -> None:
    """Partitions or chunks, and what an aggregate keeps: nothing that has a copy of a number may be read."""
    readable = measured.owner_rows(
        "select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where c.relkind in ('r', 'p', 'm', 'v') and (c.relname like 'measurement%%' or c.relname like '\\_hyper%%'"
        " or c.relname like '\\_materialized\\_hypertable%%' or n.nspname = '_timescaledb_internal'"
        " and c.relkind = 'v') and has_table_privilege('registry_service', c.oid, 'select, insert, update, delete')"
        " and n.nspname <> 'timescaledb_information'"
    )
    assert readable == []


def test_sums_by_day_are_those_of_the_numbers(measured: MeasurementsDatabase) -> None:
    measured.measure(A, JOB_AB, 4, -5.0, NOON + timedelta(hours=2))
    found = measured.rows(
        "select day, points, lowest, highest, total, first_version, last_version from registry.performance_by_day"
        " where hospital_id = %s and job_id = %s and name = 'n' order by day",
        A,
        JOB_AB,
        hospital_id=A,
    )
    day = NOON.date()
    assert found == [(day, 3, -5.0, 21.0, 27.0, 1, 4), (day + timedelta(days=1), 1, 31.0, 31.0, 31.0, 3, 3)]
    counted = "select hospital_id, job_id, name, day, points, total from registry.performance_by_day where name = 'n'"
    counted += " order by 1, 2, 3, 4"
    derived = (
        "select hospital_id, job_id, name, (recorded_at at time zone 'UTC')::date, count(*), sum(value)"
        " from registry.performance where name = 'n' group by 1, 2, 3, 4 order by 1, 2, 3, 4"
    )
    assert measured.rows(counted, scope="consortium") == measured.rows(derived, scope="consortium")


def test_a_transaction_that_fails_leaves_no_sum(measured: MeasurementsDatabase) -> None:
    before = measured.rows("select * from registry.performance_by_day order by 1, 2, 3, 4", scope="consortium")
    measure = (
        "insert into registry.performance (hospital_id, job_id, version, name, value, recorded_at)"
        " values ('', %s, 8, %s, 1, now())"
    )
    with measured.acting(scope="consortium") as connection:
        connection.execute(measure, (JOB_AB, "n"))
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(measure, (JOB_AB, "n" * 101))
    after = measured.rows("select * from registry.performance_by_day order by 1, 2, 3, 4", scope="consortium")
    assert after == before


class TestNative:
    """Partitions that the registry looks after; TimescaleDB has policies for that."""

    @pytest.fixture(autouse=True)
    def _only_native(self) -> None:
        if TIMESCALE_DSN:
            pytest.skip("TimescaleDB keeps its chunks by policies")

    def tend(self, database: MeasurementsDatabase) -> tuple[int, int]:
        made, dropped = database.rows("select * from registry.tend_measurements()", scope="consortium")[0]
        return made, dropped

    def months(self, database: MeasurementsDatabase) -> list[str]:
        return [name for (name,) in database.owner_rows(PARTITIONS)]

    @pytest.fixture
    def impatient(self, measured: MeasurementsDatabase) -> Iterator[Callable[[], object]]:
        """Keep two months only, from its call to the end of the test."""
        keep = "update registry.measurement_policy set months_kept = %s"
        yield partial(measured.owner_rows, keep, 2)
        measured.owner_rows(keep, 24)

    def test_there_are_partitions_for_this_month_and_the_next(self, measured: MeasurementsDatabase) -> None:
        first = NOW.replace(day=1)
        for _ in range(3):
            assert f"measurements_{first:%Y_%m}" in self.months(measured)
            first = (first + timedelta(days=32)).replace(day=1)
        assert f"measurements_{first:%Y_%m}" not in self.months(measured)
        assert self.tend(measured) == (0, 0)

    def test_late_numbers_get_a_partition_and_old_ones_are_dropped(
        self, measured: MeasurementsDatabase, impatient: Callable[[], object]
    ) -> None:
        late, old = NOW - timedelta(days=200), NOW - timedelta(days=1200)
        for at in (late, old):
            measured.measure(A, JOB_AB, 7, 7.0, at, "late")
        read = "select recorded_at from registry.performance where name = 'late'"
        days = "select day from registry.performance_by_day where name = 'late' order by 1"
        assert self.tend(measured) == (1, 0)
        assert f"measurements_{late:%Y_%m}" in self.months(measured)
        # What is older than what is kept is gone; the day's sum stays.
        assert measured.rows(read, hospital_id=A) == [(late,)]
        assert measured.rows(days, hospital_id=A) == [(old.date(),), (late.date(),)]
        assert measured.owner_rows("select count(*) from registry.measurements_default") == [(0,)]
        impatient()
        assert self.tend(measured) == (0, 1)
        assert measured.rows(read, hospital_id=A) == []
        assert measured.rows(days, hospital_id=A) == [(old.date(),), (late.date(),)]
        assert self.tend(measured) == (0, 0)

    def test_a_partition_in_use_is_dropped_later(
        self, measured: MeasurementsDatabase, impatient: Callable[[], object]
    ) -> None:
        measured.measure(A, JOB_AB, 7, 7.0, NOW - timedelta(days=300), "used")
        assert self.tend(measured) == (1, 0)
        impatient()
        with measured.acting(hospital_id=A) as reader:
            reader.execute("select count(*) from registry.performance")
            assert self.tend(measured) == (0, 0)
        assert self.tend(measured) == (0, 1)

    def test_a_number_that_is_being_written_delays_its_partition(self, measured: MeasurementsDatabase) -> None:
        at = NOW - timedelta(days=500)
        add = "insert into registry.performance values ('', %s, 7, 'being-written', 1, %s)"
        measured.measure(A, JOB_AB, 7, 7.0, at, "before")
        with measured.acting(scope="consortium") as writer:
            writer.execute(add, (JOB_AB, at))
            assert self.tend(measured) == (0, 0)
        with psycopg.connect(measured.dsns["registry_service"]) as tending:
            # As the registry's transactions are: what comes after the first statement is not in the snapshot.
            tending.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            tending.execute("select from registry.metrics limit 1")
            measured.measure(A, JOB_AB, 8, 7.0, at, "before")
            assert tending.execute("select * from registry.tend_measurements()").fetchone() == (0, 0)
        assert self.tend(measured) == (1, 0)

    def test_one_registry_at_a_time_tends(self, measured: MeasurementsDatabase) -> None:
        measured.measure(A, JOB_AB, 7, 7.0, NOW - timedelta(days=400), "once")
        with measured.acting(scope="consortium") as other:
            assert other.execute("select made from registry.tend_measurements()").fetchone() == (1,)
            assert self.tend(measured) == (0, 0)

    def test_a_read_of_a_job_is_an_index_scan(self, measured: MeasurementsDatabase) -> None:
        """The view's filter must not keep the index from being used."""
        with measured.acting(hospital_id=A) as connection:
            connection.execute("set local enable_seqscan = off")
            plan: list[Any] = connection.execute(
                "explain select * from registry.performance where job_id = %s and hospital_id = any(%s) and version > 1"
                " and version <= 20",
                (JOB_AB, ["", A]),
            ).fetchall()
        told = "\n".join(line for (line,) in plan)
        assert "Index Cond" in told
        assert "hospital_id = ANY" in told.split("Index Cond")[1].splitlines()[0]
