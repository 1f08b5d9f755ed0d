"""A registry database for the contract of measurements: native, or with TimescaleDB where a server with it is given."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from services.common.config import PostgresConfig
from services.common.migrations import migrate
from services.embedded import postgres_roles
from services.embedded.postgres import EmbeddedPostgres
from services.registry.store import MIGRATIONS, SCHEMA

TIMESCALE_DSN: Final = os.environ.get("FEDMESH_TIMESCALE_DSN", "")
"""A superuser's libpq connection string to a server that has the extension; set by `make test-timescale`."""
_EXTENSION_SCHEMA: Final = "timescale"

A, B, C = "north", "south", "west"
JOB_AB, JOB_BC = uuid.UUID(int=1, version=4), uuid.UUID(int=2, version=4)
COHORTS = {JOB_AB: (A, B), JOB_BC: (B, C)}
PLAN = "a" * 64


@dataclass(frozen=True)
class MeasurementsDatabase:
    """A migrated registry database. dsn: by role, a libpq connection string."""

    timescale: bool
    dsns: dict[str, str]

    @contextmanager
    def acting(self, role: str = "registry_service", **settings: str) -> Iterator[psycopg.Connection[Any]]:
        """A transaction of a role with these settings of row-level security, committed at its end."""
        with psycopg.connect(self.dsns[role]) as connection:
            for name, value in settings.items():
                connection.execute("select set_config(%s, %s, true)", (f"app.{name}", value))
            yield connection

    def rows(self, statement: str, *parameters: object, **settings: str) -> list[tuple[Any, ...]]:
        """What the service's role reads with these settings."""
        with self.acting(**settings) as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    def owner_rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What the superuser reads or does."""
        with self.acting("postgres") as connection:
            result = connection.execute(statement.encode(), parameters)
            return result.fetchall() if result.description else []

    def found(self) -> None:
        """Three hospitals and two jobs, of the first two hospitals and of the last two."""
        with self.acting(scope="consortium") as connection:
            for name in (A, B, C):
                connection.execute("insert into registry.hospitals values (%s, '', 'active', now())", (name,))
            connection.execute(
                "insert into registry.plans (plan_id, name, rounds, private, status, proposed_by, approved_by,"
                " created_at, manifest) values (%s, 'plan', 3, false, 'approved', 'a', 'b', now(), '{}')",
                (PLAN,),
            )
            for job, cohort in COHORTS.items():
                connection.execute(
                    "insert into registry.jobs (job_id, plan_id, hospital_ids, status, version, created_at)"
                    " values (%s, %s, %s, 'running', 0, now())",
                    (job, PLAN, list(cohort)),
                )
                for name in cohort:
                    connection.execute("insert into registry.job_hospitals values (%s, %s)", (name, job))

    def measure(
        self, hospital: str, job: uuid.UUID, version: int, value: float, at: datetime, name: str = "n", **settings: str
    ) -> None:
        """One number, written by the service's role; for the consortium unless other settings are given."""
        with self.acting(**(settings or {"scope": "consortium"})) as connection:
            connection.execute(
                "insert into registry.performance (hospital_id, job_id, version, name, value, recorded_at)"
                " values (%s, %s, %s, %s, %s, %s)",
                (hospital, job, version, name, value, at),
            )


@contextmanager
def native(server: EmbeddedPostgres) -> Iterator[MeasurementsDatabase]:
    """A fresh database of the embedded PostgreSQL, migrated; dropped afterwards."""
    name = f"measurements_{uuid.uuid4().hex[:12]}"
    server.start()
    server.create_database(name)
    try:
        migrate(server.config("registry_migrator", database=name), SCHEMA, MIGRATIONS)
        dsns = {role: server.dsn(role, database=name) for role in ("postgres", "registry_service")}
        yield MeasurementsDatabase(False, dsns)
    finally:
        server.start()
        server.drop_database(name)


@contextmanager
def with_timescale(dsn: str) -> Iterator[MeasurementsDatabase]:
    """A fresh database with the extension on a server that has it, migrated; dropped afterwards. Roles of the server
    that have fedmesh's names get new passwords: use a server for tests.
    """
    name, password = f"fedmesh_test_{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
    roles = {role: make_conninfo(dsn, dbname=name, user=role, password=password) for role in postgres_roles.LOGIN_ROLES}
    with psycopg.connect(dsn, autocommit=True) as server:
        postgres_roles.create_roles(server)
        for role in roles:
            postgres_roles.set_password(server, role, password)
        postgres_roles.create_database(server, name)
        try:
            with psycopg.connect(make_conninfo(dsn, dbname=name), autocommit=True) as inside:
                postgres_roles.create_schemas(inside, name)
                schema = sql.Identifier(_EXTENSION_SCHEMA)
                inside.execute(sql.SQL("create schema {}").format(schema))
                inside.execute(sql.SQL("create extension timescaledb schema {}").format(schema))
                inside.execute(sql.SQL("grant usage on schema {} to registry_owner, registry_migrator").format(schema))
            migrate(PostgresConfig(dsn=roles["registry_migrator"]), SCHEMA, MIGRATIONS)
            yield MeasurementsDatabase(True, {"postgres": make_conninfo(dsn, dbname=name), **roles})
        finally:
            server.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
