"""Migrations of a schema, and which releases run on what they made (ADR 52).

A release is known here by its newest migration. Every migration says in its file which release is the oldest that runs
on what it makes (`-- oldest-release: NNNN`). The one that migrates writes that into the database, so that an older
program, which does not have the file, can read it there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, LiteralString
from urllib.parse import quote

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.postgres import Connection, Database, conninfo
from services.common.telemetry import get_logger

log = get_logger(__name__)

_OLDEST: Final = re.compile(r"^-- oldest-release: (\d{4})$", re.MULTILINE)
_APPLIED: Final[LiteralString] = "select migration_id from {}._yoyo_migration"
_RECORDED: Final[LiteralString] = "select migration_id, oldest from {}._compatibility"
# Beside yoyo's own tables and made like them: it must be there before the first migration. A word that was given is
# only ever made stricter, also where an older release, with an older file, says it again.
_MAKE: Final[LiteralString] = (
    "create table if not exists {schema}._compatibility (migration_id text primary key, oldest integer not null);"
    " grant select on {schema}._compatibility to {service}"
)
_RECORD: Final[LiteralString] = (
    "insert into {}._compatibility as known values (%s, %s) on conflict (migration_id) do update"
    " set oldest = excluded.oldest where known.oldest < excluded.oldest"
)


class NewerSchemaError(FedmeshError):
    """The schema has a migration after which this release must not run."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.WRONG_STATE, message)


@dataclass(frozen=True)
class Release:
    """What a release knows of one schema. oldest: by migration, the number of the oldest release that runs on it."""

    schema: str
    oldest: Mapping[str, int]

    @classmethod
    def read(cls, schema: str, migrations: Path) -> "Release":
        """Raises: ValueError for a migration that does not say which release is the oldest that runs on it."""
        oldest = {}
        for path in migrations.glob("[0-9]*.sql"):
            if ".rollback" in path.name:
                continue
            said = _OLDEST.search(path.read_text())
            if said is None or not 1 <= int(said[1]) <= _number(path.stem):
                raise ValueError(f"{path.name} has no line `-- oldest-release: NNNN` of a migration up to its own")
            oldest[path.stem] = int(said[1])
        return cls(schema, oldest)

    def missing(self, applied: Iterable[str]) -> list[str]:
        """Migrations of this release that were not applied."""
        return sorted(self.oldest.keys() - set(applied))

    def newer(self, applied: Iterable[str]) -> list[str]:
        """Applied migrations that this release does not know."""
        return sorted(set(applied) - self.oldest.keys())

    def require_runs_with(self, newer: Iterable[str], recorded: Mapping[str, int]) -> None:
        """Raises: NewerSchemaError when one of these migrations does not let this release run."""
        own = max(map(_number, self.oldest), default=0)
        for migration in newer:
            needed = recorded.get(migration)
            if needed is None or needed > own:
                which = migration if needed is None else f"migration {needed:04}"
                raise NewerSchemaError(
                    f"schema {self.schema} has {migration}, which needs a release that knows {which}, and this one "
                    f"knows {own:04} at most: run a newer release, or restore a backup from before that migration"
                )


def migrate(config: PostgresConfig, schema: str, migrations: Path) -> list[str]:
    """Apply the pending SQL migrations of one schema, in order, under a lock. Safe to run twice and concurrently; does
    nothing to a schema of a newer release.

    The role must own the schema or be a member of its owner role. Returns the ids that were applied.

    Raises: FedmeshError(STORE_UNAVAILABLE) when PostgreSQL is away, (WRONG_STATE) when a newer release changed the
        schema so that this one cannot run on it.
    """
    from yoyo import get_backend, read_migrations

    release = Release.read(schema, migrations)
    try:
        with get_backend(_yoyo_url(conninfo(config), schema)) as backend, backend.lock(timeout=60):
            # Makes yoyo's own tables, where there are none.
            pending = backend.to_apply(read_migrations(str(migrations)))
            _record(config, release)
            applied = [migration.id for migration in pending]
            backend.apply_migrations(pending)
    except psycopg.OperationalError as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the database cannot be reached for migration") from error
    return applied


async def require_migrated(database: Database, schema: str, migrations: Path) -> list[str]:
    """Refuse to run against a schema that is older than this release, or that a newer one changed too much.

    Returns the migrations of newer releases that are there.

    Raises: FedmeshError(WRONG_STATE) saying which migrations are missing; NewerSchemaError.
    """
    # A handful of files, read once at start.
    release = Release.read(schema, migrations)

    async def applied(connection: Connection) -> set[str]:
        rows = await connection.execute(_of(schema, _APPLIED))
        return {row["migration_id"] async for row in rows}

    async def recorded(connection: Connection) -> dict[str, int]:
        rows = await connection.execute(_of(schema, _RECORDED))
        return {row["migration_id"]: row["oldest"] async for row in rows}

    try:
        present = await database.run_tx("schema_version", applied)
    except pg.UndefinedTable:
        present = set()
    if missing := release.missing(present):
        raise FedmeshError(Code.WRONG_STATE, f"schema {schema} lacks {', '.join(missing)}: run `fedmesh migrate` first")
    newer = release.newer(present)
    if newer:
        try:
            release.require_runs_with(newer, await database.run_tx("schema_compatibility", recorded))
        except pg.UndefinedTable:
            release.require_runs_with(newer, {})
        log.warning("schema_of_newer_release", schema=schema, migrations=newer)
    return newer


def _record(config: PostgresConfig, release: Release) -> None:
    """Say which releases run on what is about to be applied; before it is, so that nobody finds one without the other.

    Raises: NewerSchemaError, with nothing written; FedmeshError(WRONG_STATE) for releases that are not in one line.
    """
    with psycopg.connect(conninfo(config)) as connection:
        names = {"schema": sql.Identifier(release.schema), "service": sql.Identifier(f"{release.schema}_service")}
        connection.execute(sql.SQL(_MAKE).format(**names))
        applied = {row[0] for row in connection.execute(_of(release.schema, _APPLIED))}
        if newer := release.newer(applied):
            release.require_runs_with(newer, dict(connection.execute(_of(release.schema, _RECORDED)).fetchall()))
            if missing := release.missing(applied):
                told = (
                    f"schema {release.schema} has {', '.join(newer)} and lacks {', '.join(missing)}: no release made it"
                )
                raise FedmeshError(Code.WRONG_STATE, told)
        with connection.cursor() as cursor:
            cursor.executemany(_of(release.schema, _RECORD), list(release.oldest.items()))


def _of(schema: str, query: LiteralString) -> sql.Composed:
    return sql.SQL(query).format(sql.Identifier(schema))


def _number(migration: str) -> int:
    return int(migration.split("_", 1)[0])


def _yoyo_url(dsn: str, schema: str) -> str:
    parts: dict[str, Any] = dict(conninfo_to_dict(dsn))
    user, password = quote(str(parts.pop("user", "")), safe=""), quote(str(parts.pop("password", "")), safe="")
    name = quote(str(parts.pop("dbname", "fedmesh")), safe="")
    host, port = str(parts.pop("host", "")), parts.pop("port", None)
    query = [f"schema={schema}"]
    # A socket's folder, or several servers of which one takes writes: neither fits in front of a URL's path.
    if host.startswith("/") or "," in host:
        query.append(f"host={quote(host, safe='')}")
        host = ""
    location = f"{host}:{port}" if host and port else host
    if port and not host:
        query.append(f"port={port}")
    query += [f"{key}={quote(str(value), safe='')}" for key, value in parts.items()]
    return f"postgresql+psycopg://{user}:{password}@{location}/{name}?{'&'.join(query)}"
