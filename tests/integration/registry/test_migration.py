"""From the schema before, with data in it and its release still writing, to the present one."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from services.common.clock import SystemClock
from services.common.errors import FedmeshError
from services.common.identity import parse_identity
from services.common.migrations import migrate
from services.common.postgres import Database
from services.registry.domain.entities import Contribution, StrikeRule
from services.registry.domain.performance import Subject
from services.registry.store import MIGRATIONS, SCHEMA
from services.registry.store.postgres import PostgresStore
from services.registry.usecases.attestations import Attestor
from services.registry.usecases.hospitals import HospitalUseCases
from services.registry.usecases.jobs import JobUseCases
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.performance import PerformanceUseCases
from services.registry.usecases.ports import Command
from services.registry.usecases.rounds import RoundUseCases
from tests.support.stores import PostgresDatabase

JOB, PLAN, STATE = "5d7ce7a0-0000-4000-8000-000000000001", "a" * 64, "b" * 64
# In a month for which the migration must make a partition.
LONG_AGO = datetime.now(UTC) - timedelta(days=200)
OPERATOR = parse_identity("spiffe://consortium.test/operator/alice")
NORTH = parse_identity("spiffe://consortium.test/hospital/north")
WEST = parse_identity("spiffe://consortium.test/hospital/west")
COORDINATOR = parse_identity("spiffe://consortium.test/service/coordinator")

# What the release before writes, column by column.
HOSPITAL = (
    "insert into registry.hospitals (hospital_id, display_name, status, created_at) values (%s, '', 'active', now())"
)
BEGIN: tuple[tuple[str, tuple[object, ...]], ...] = (
    (HOSPITAL, ("north",)),
    (HOSPITAL, ("south",)),
    (
        "insert into registry.plans (plan_id, name, rounds, private, status, proposed_by, approved_by, created_at,"
        " manifest) values (%s, 'plan', 3, false, 'approved', 'a', 'b', now(), '{}')",
        (PLAN,),
    ),
    (
        "insert into registry.jobs (job_id, plan_id, hospital_ids, status, reason, version, created_at)"
        " values (%s, %s, '{north,south}', 'running', '', 0, now())",
        (JOB, PLAN),
    ),
    ("insert into registry.job_hospitals (hospital_id, job_id) select unnest('{north,south}'::text[]), %s", (JOB,)),
    (
        "insert into registry.job_blobs (job_id, sha256, hospital_id, created_at) values (%s, %s, 'north', now())",
        (JOB, STATE),
    ),
    ("insert into registry.blobs (sha256, size_bytes, created_at) values (%s, 1, now())", (STATE,)),
)
ROUND = (
    ("insert into registry.attempts (job_id, round, attempt, reason, opened_at) values (%(job)s, %(v)s, 1, '', now())"),
    (
        "insert into registry.rounds (job_id, version, attempt, sum_sha256, state_sha256, contributions_root, agreeing,"
        " dissenting, attesting, finalizer, metrics_json, upload_bytes, sealed_at, committed_at, content_sha256)"
        " values (%(job)s, %(v)s, 1, repeat('c', 64), %(state)s, repeat('d', 64), '{north,south}', '{}', '{}', 'north',"
        " '', 1, now(), now(), sha256(''))"
    ),
    (
        "insert into registry.contributions (hospital_id, job_id, version, ciphertext_sha256)"
        " values ('south', %(job)s, %(v)s, repeat('f', 64)), ('north', %(job)s, %(v)s, repeat('e', 64))"
    ),
    "update registry.jobs set version = %(v)s where job_id = %(job)s",
)


METRIC = (
    "insert into registry.metrics (job_id, version, name, value, recorded_at)"
    " select %s, %s, n, v, %s from unnest(%s::text[], %s::double precision[]) as given (n, v)"
)


def write(database: PostgresDatabase, *statements: tuple[str, Any]) -> None:
    with psycopg.connect(database.dsn("registry_service")) as connection:
        connection.execute("select set_config('app.scope', 'consortium', true)")
        for statement, parameters in statements:
            connection.execute(statement.encode(), parameters)


def commit(database: PostgresDatabase, version: int) -> None:
    write(database, *((each, {"job": JOB, "v": version, "state": STATE}) for each in ROUND))


async def test_data_and_writers_of_the_release_before_stay_good(postgres: PostgresDatabase, tmp_path: Path) -> None:
    shutil.copy(MIGRATIONS / "0001_registry.sql", tmp_path)
    config = postgres.config("registry_migrator")
    assert migrate(config, SCHEMA, tmp_path) == ["0001_registry"]
    write(postgres, *BEGIN)
    commit(postgres, 1)
    write(postgres, (METRIC, (JOB, 1, LONG_AGO, ["auroc", "loss"], [0.6, 0.4])))
    later = [path.stem for path in sorted(MIGRATIONS.glob("[0-9]*.sql"))[1:]]
    assert later[0] == "0002_secure_sum"
    assert migrate(config, SCHEMA, MIGRATIONS) == later
    assert migrate(config, SCHEMA, MIGRATIONS) == []
    commit(postgres, 2)
    write(postgres, (METRIC, (JOB, 2, datetime.now(UTC), ["auroc"], [0.7])))
    write(postgres, (HOSPITAL, ("west",)))

    pool = Database(postgres.config("registry_service"))
    await pool.open()
    try:
        store, clock = PostgresStore(pool), SystemClock()
        mutations = Mutations(store, clock, lambda: None)
        jobs = JobUseCases(store, mutations, clock)
        found = (await jobs.list(OPERATOR, None, 10, None)).items[0]
        assert (found.version, found.state_sha256, found.roster_sha256, found.roster_size) == (2, STATE, "", 0)
        rounds_of = RoundUseCases(store, mutations, clock, Attestor(None))
        rounds = await rounds_of.list(OPERATOR, found.job_id, 0, 10)
        assert [(item.round.burnt, item.round.survivors_sha256, item.round.sum_sha256) for item in rounds] == [
            (False, "", "c" * 64)
        ] * 2
        given = (Contribution("north", "e" * 64), Contribution("south", "f" * 64))
        assert [item.round.contributions for item in rounds] == [given] * 2
        versions = (await rounds_of.model_versions(NORTH, found.job_id, 10, None)).items
        assert [(item.committed.round.version, item.size_bytes) for _, item in versions] == [(2, 1), (1, 1)]
        assert not (await rounds_of.model_versions(WEST, None, 10, None)).items
        asked = PerformanceUseCases(store)
        measured, _ = await asked.list(OPERATOR, Subject(job_id=found.job_id), 0, 20)
        assert [(item.version, item.name, item.value) for item in measured] == [
            (1, "auroc", 0.6),
            (1, "loss", 0.4),
            (2, "auroc", 0.7),
        ]
        assert [item.value for item in await rounds_of.metrics(OPERATOR, found.job_id, "auroc")] == [0.6, 0.7]
        days = await asked.by_day(OPERATOR, Subject(job_id=found.job_id, name="auroc"), 400)
        assert [(item.points, item.mean) for item in days] == [(1, 0.6), (1, 0.7)]
        hospitals = await HospitalUseCases(store, mutations, clock, StrikeRule(5, 3600)).list(OPERATOR)
        assert [(item.hospital_id, item.strikes) for item in hospitals] == [("north", 0), ("south", 0), ("west", 0)]
        command: Command[Any] = Command(found.job_id, COORDINATOR, "OpenAttempt", b"\0" * 32, lambda _: b"")
        with pytest.raises(FedmeshError, match="cancel it and start another"):
            await jobs.open_attempt(command, found.job_id, 3, "")
    finally:
        await pool.close()


def test_a_round_is_seen_by_its_job_whatever_its_writer_says(postgres: PostgresDatabase) -> None:
    migrate(postgres.config("registry_migrator"), SCHEMA, MIGRATIONS)
    write(postgres, *BEGIN, (HOSPITAL, ("west",)))
    facts = {"job": JOB, "v": 1, "state": STATE}
    attempt, inserting, *_ = ROUND
    told = inserting.replace("content_sha256)", "content_sha256, hospital_ids, state_bytes)", 1)
    told = told.replace("sha256(''))", "sha256(''), '{west}', 9)")
    # One by one, as no release writes: the round has them all.
    one = "insert into registry.contributions values (%(h)s, %(job)s, %(v)s, repeat('e', 64))"
    write(postgres, (attempt, facts), (told, facts), *((one, facts | {"h": name}) for name in ("north", "south")))
    with psycopg.connect(postgres.dsn("registry_service")) as connection:
        for hospital, seen in (("north", 1), ("south", 1), ("west", 0), ("", 0)):
            connection.execute("select set_config('app.hospital_id', %s, true)", (hospital,))
            rows = connection.execute("select hospital_ids, contributed, state_bytes from registry.rounds").fetchall()
            assert rows == [(["north", "south"], [[name, "e" * 64, "0"] for name in ("north", "south")], 1)] * seen


def test_a_round_is_whole_or_burnt(postgres: PostgresDatabase) -> None:
    migrate(postgres.config("registry_migrator"), SCHEMA, MIGRATIONS)
    write(postgres, *BEGIN)
    attempt, inserting, *_ = ROUND
    for part in ("state_sha256", "sum_sha256", "finalizer"):
        broken = inserting.replace("sealed_at,", "burnt, sealed_at,", 1).replace(" '', 1, now()", " '', 1, true, now()")
        holes = {"state_sha256": "%(state)s", "sum_sha256": "repeat('c', 64)", "finalizer": "'north'"}
        whole = inserting.replace(holes[part], "null", 1)
        for statement in (whole, broken):
            facts = {"job": JOB, "v": 1, "state": STATE}
            with pytest.raises(psycopg.errors.CheckViolation):
                write(postgres, (attempt, facts), (statement, facts))
