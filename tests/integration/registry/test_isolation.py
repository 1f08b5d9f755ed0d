"""Row-level security, asked with the service's own role: what a transaction does not stand for, it does not see."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from fedmesh.registry.v1 import registry_pb2 as pb
from psycopg import sql

from services.common.errors import Code
from services.common.grpc.client import call
from services.common.identity import parse_identity
from services.common.postgres import Statements
from services.registry.usecases.ports import Transaction
from tests.integration.registry.harness import CONSORTIUM, HOSPITALS, Registry, code, digest, refused, striking
from tests.integration.registry.test_ledgers import chain, reporting

GUARDED = (
    "requests",
    "hospitals",
    "jobs",
    "job_hospitals",
    "attempts",
    "blobs",
    "blob_chunks",
    "job_blobs",
    "rounds",
    "contributions",
    "rosters",
    "epochs",
    "survivors",
    "strikes",
    "ledger_entries",
    "outbox",
)
# Any two cohorts of a roster have hospitals in common; the first of A is not in B, the last of B is not in A.
OF_A, OF_B = HOSPITALS[:4], HOSPITALS[1:]


@contextmanager
def context(registry: Registry, **settings: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of the service's role with these settings of row-level security."""
    with psycopg.connect(registry.database.dsn("registry_service")) as connection:
        for name, value in settings.items():
            connection.execute("select set_config(%s, %s, true)", (f"app.{name}", value))
        yield connection


def rows(connection: psycopg.Connection[Any], table: str) -> list[Any]:
    statement = sql.SQL("select * from registry.{}").format(sql.Identifier(table))
    return connection.execute(statement).fetchall()


@pytest.fixture
async def two_jobs(registry: Registry) -> tuple[pb.Job, pb.Job]:
    """Two jobs of different cohorts, each with a committed round; every hospital has a strike."""
    await registry.found(*HOSPITALS)
    jobs = await registry.job(*OF_A), await registry.job(*OF_B)
    for job in jobs:
        await registry.commit(job, 1, f"state of {job.job_id}".encode())
    for name in HOSPITALS:
        await call(registry.service().RecordStrike, striking(name))
        await call(registry.hospital(name).ReportLedger, reporting(chain(jobs[0].job_id), by=name))
    return jobs


async def test_without_context_there_are_no_rows(registry: Registry, two_jobs: Any) -> None:
    with context(registry, scope="consortium") as connection:
        assert [table for table in GUARDED if not rows(connection, table)] == []
    for settings in ({}, {"hospital_id": ""}, {"scope": "", "hospital_id": ""}, {"scope": "hospital"}):
        with context(registry, **settings) as connection:
            assert [table for table in GUARDED if rows(connection, table)] == []


async def test_every_table_with_hospitals_is_guarded(registry: Registry, two_jobs: Any) -> None:
    tables = registry.sql(
        "select relname, relrowsecurity and relforcerowsecurity, pg_get_userbyid(relowner) from pg_class"
        " where relnamespace = 'registry'::regnamespace and relkind in ('r', 'p') and relname not like '%%yoyo%%'"
    )
    unguarded = {name for name, guarded, _ in tables if not guarded}
    # TimescaleDB refuses policies on what it aggregates: so of these the service may touch none, not even a partition.
    closed = {name for name in unguarded if name.startswith("measurement")}
    assert {"measurements", "measurements_default", "measurements_by_day", "measurement_policy"} < closed
    assert unguarded - closed == {"plans", "_compatibility"}
    rights = ("select", "insert", "update", "delete", "truncate", "references", "trigger")
    for name in sorted(closed):
        for right in rights:
            asked = "select has_table_privilege('registry_service', %s, %s)"
            assert registry.sql(asked, f"registry.{name}", right) == [(False,)], (name, right)
    assert {owner for _, _, owner in tables} == {"registry_owner"}
    assert registry.sql(
        "select rolname, rolcanlogin, rolbypassrls, rolsuper from pg_roles where rolname like 'registry%%' order by 1"
    ) == [
        ("registry_migrator", True, False, False),
        ("registry_owner", False, False, False),
        ("registry_service", True, False, False),
    ]


async def test_a_hospital_sees_nothing_of_others_jobs(registry: Registry, two_jobs: tuple[pb.Job, pb.Job]) -> None:
    mine, _ = two_jobs
    with context(registry, hospital_id=OF_A[0]) as connection:

        def column(table: str, name: str) -> set[str]:
            statement = sql.SQL("select {}::text from registry.{}").format(sql.Identifier(name), sql.Identifier(table))
            return {row[0] for row in connection.execute(statement)}

        for table in ("jobs", "job_hospitals", "attempts", "job_blobs", "rounds", "contributions"):
            assert column(table, "job_id") == {mine.job_id}, table
        assert column("hospitals", "hospital_id") == {OF_A[0]}
        assert column("job_hospitals", "hospital_id") == {OF_A[0]}
        assert column("contributions", "hospital_id") == set(OF_A)
        own = {digest(f"state of {mine.job_id}".encode())}
        assert column("blobs", "sha256") == column("blob_chunks", "sha256") == own
        assert column("strikes", "hospital_id") == column("ledger_entries", "hospital_id") == {OF_A[0]}
        assert column("requests", "caller") == {f"spiffe://{CONSORTIUM}/hospital/{OF_A[0]}"}
        # What is for every member: who is a member, and keys that are sealed to each.
        assert (len(rows(connection, "rosters")), len(rows(connection, "epochs"))) == (1, 1)
        assert rows(connection, "outbox") == rows(connection, "survivors") == []
    with context(registry, hospital_id=OF_B[-1]) as connection:
        # Its report of its own ledger, and nothing else.
        assert len(rows(connection, "requests")) == 1


async def test_a_hospital_cannot_write_for_others(registry: Registry, two_jobs: tuple[pb.Job, pb.Job]) -> None:
    mine, theirs = two_jobs
    link = "insert into registry.job_blobs values (%s, %s, %s, now())"
    epoch = "insert into registry.epochs select roster_sha256, 2, %s, statement, signature, now() from registry.epochs"
    strike = "insert into registry.strikes values (%s, gen_random_uuid(), 'internal', '', null, null, null, '', now())"
    entry = "insert into registry.ledger_entries values (%s, 9, 'released', '', null, null, '{}', %s, null, now())"
    forbidden = [
        (entry, (OF_A[1], "a" * 64)),
        (link, (theirs.job_id, "a" * 64, OF_A[0])),
        (link, (mine.job_id, "a" * 64, OF_A[1])),
        ("insert into registry.blobs values (%s, 1, now())", ("a" * 64,)),
        ("insert into registry.blob_chunks values (%s, 7, 'x')", (digest(f"state of {theirs.job_id}".encode()),)),
        ("insert into registry.job_hospitals values (%s, %s)", (OF_A[0], theirs.job_id)),
        ("insert into registry.hospitals values ('new', '', 'active', now())", ()),
        (epoch, (OF_A[1],)),
        (strike, (OF_A[1],)),
        (strike, (OF_A[0],)),
        (
            "insert into registry.rosters select 2, repeat('a', 64), statement, members, signers, signatures, '', now()"
            " from registry.rosters",
            (),
        ),
        (
            "insert into registry.requests values (gen_random_uuid(), %s, '', sha256(''), '', now())",
            (f"spiffe://{CONSORTIUM}/hospital/{OF_A[1]}",),
        ),
    ]
    for statement, parameters in forbidden:
        with context(registry, hospital_id=OF_A[0]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode(), parameters)
    with context(registry, hospital_id=OF_A[0]) as connection:
        assert connection.execute("update registry.jobs set status = 'failed', ended_at = now()").rowcount == 0
        assert connection.execute("update registry.hospitals set status = 'active'").rowcount == 0
        assert connection.execute("update registry.hospitals set strikes_from = now()").rowcount == 0
        assert connection.execute("update registry.survivors set details = null").rowcount == 0
        made_itself = connection.execute(epoch.encode(), (OF_A[0],))
        assert made_itself.rowcount == 1


async def test_history_cannot_be_changed_by_the_service(registry: Registry, two_jobs: Any) -> None:
    for statement in (
        "delete from registry.rounds",
        "update registry.rounds set version = 9",
        "update registry.contributions set version = 9",
        "delete from registry.outbox",
        "update registry.outbox set body_json = '{}'",
        "update registry.plans set manifest = ''",
        "select * from registry.measurements",
        "select * from registry.measurements_default",
        "select * from registry.measurements_by_day",
        "select * from registry.measurement_policy",
        "insert into registry.measurements_by_day select from registry.performance",
        "truncate registry.measurements",
        "delete from registry.metrics",
        "update registry.performance set value = 1",
        "delete from registry.performance_by_day",
        "update registry.measurement_policy set months_kept = 1",
        "select registry.make_measurements_month('2020-01-01')",
        "delete from registry.rosters",
        "update registry.rosters set statement = 'x'",
        "delete from registry.epochs",
        "update registry.epochs set statement = 'x'",
        "delete from registry.survivors",
        "update registry.survivors set statement = 'x'",
        "update registry.survivors set details = 'x'",
        "delete from registry.strikes",
        "update registry.strikes set at = now()",
        "delete from registry.ledger_entries",
        "update registry.ledger_entries set body = '{}'",
        "insert into registry.ledger_entries select hospital_id, 9, 'released', '', null, null, body, sha256, null,"
        " now() from registry.ledger_entries",
        "update registry.jobs set roster_sha256 = null",
        "update registry.rounds set burnt = true",
        "update registry.rounds set hospital_ids = '{}'",
        "update registry.rounds set contributed = null",
        "update registry.jobs set hospital_ids = '{}'",
        "select registry.note_contributions()",
        "update registry.attempts set epoch = 2",
        "alter table registry.jobs disable row level security",
        "set role registry_owner",
    ):
        with context(registry, scope="consortium") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


async def test_the_api_hides_others_jobs(registry: Registry, two_jobs: tuple[pb.Job, pb.Job]) -> None:
    mine, theirs = two_jobs
    stub = registry.hospital(OF_A[0])
    state = digest(f"state of {theirs.job_id}".encode())
    for forbidden in (
        call(stub.GetJob, pb.GetJobRequest(job_id=theirs.job_id)),
        call(stub.ListRounds, pb.ListRoundsRequest(job_id=theirs.job_id)),
        call(stub.GetModelVersion, pb.GetModelVersionRequest(job_id=theirs.job_id)),
        registry.download(stub, state),
        registry.upload(OF_A[0], theirs.job_id, b"state"),
    ):
        assert await code(forbidden) is Code.NOT_FOUND
    assert (await call(stub.GetJob, pb.GetJobRequest(job_id=mine.job_id))).job.hospital_ids == list(OF_A)
    assert await registry.download(registry.operator(), state) == f"state of {theirs.job_id}".encode()
    # Content that exists elsewhere can be stored for an own job, and then be read.
    own = await registry.job(*OF_A)
    await registry.upload(OF_A[0], own.job_id, f"state of {theirs.job_id}".encode())
    assert await registry.download(stub, state) == f"state of {theirs.job_id}".encode()


async def test_a_context_ends_with_its_transaction(registry: Registry, two_jobs: Any) -> None:
    async def count(connection: Any) -> int:
        found = await connection.execute("select count(*) as n from registry.jobs")
        return int((await found.fetchone())["n"])

    for _ in range(8):
        assert await registry.pool.run_tx("count", count) == 0


async def test_who_is_no_active_member_gets_no_further_than_entering(registry: Registry, two_jobs: Any) -> None:
    await registry.suspend(OF_A[0])

    async def page(tx: Transaction) -> Any:
        return await tx.jobs.page(None, 10, None)

    async def lock(statements: Statements) -> None:
        await statements.execute("select pg_advisory_lock(42)")

    for name, why in ((OF_A[0], "is suspended: ask the consortium"), ("stranger", "is not registered")):
        who = parse_identity(f"spiffe://{CONSORTIUM}/hospital/{name}")
        for entering in (
            registry.store.run("change", who, page),
            registry.store.run("whole", who, page, whole=True),
            registry.store.ask("read", who, page),
            registry.store.ask("whole", who, page, whole=True),
        ):
            error = await refused(entering)
            assert (error.code, why in error.message) == (Code.PERMISSION_DENIED, True)
        # What travels with it is not even begun.
        with pytest.raises(psycopg.DatabaseError) as caught:
            await registry.pool.ask("lock", lock, opening=[("select registry.enter(%s)", (name,))])
        assert caught.value.sqlstate == "UM001"
        assert registry.sql("select 1 from pg_locks where locktype = 'advisory' and objid = 42") == []
    seen = await registry.store.ask("read", parse_identity(f"spiffe://{CONSORTIUM}/hospital/{OF_A[1]}"), page)
    assert len(seen.items) == 2
