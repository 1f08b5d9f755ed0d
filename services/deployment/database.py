"""Brings a PostgreSQL server to what this release needs: database, roles, passwords, schemas, tables."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import make_conninfo

from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
from services.common.config import PostgresConfig, read_secret
from services.common.errors import Code, FedmeshError
from services.common.migrations import NewerSchemaError, migrate, require_migrated
from services.common.postgres import Database, conninfo
from services.deployment.config import DatabaseConfig, SchemaConfig
from services.embedded import postgres_roles
from services.registry.store import MIGRATIONS as REGISTRY_MIGRATIONS

MIGRATIONS: Final[dict[str, Path]] = {"registry": REGISTRY_MIGRATIONS, "audit": AUDIT_MIGRATIONS}
_PAUSE_S: Final = 2.0
# Two Jobs may run at once, one of a failed upgrade and one of the next: CREATE ROLE and GRANT would get in each other's
# way. The number is this program's own.
_LOCK: Final = 0x6665646D


def prepare(config: DatabaseConfig) -> Iterator[str]:
    """Make what is missing, set all passwords, run the pending migrations. Yields a line for each step done.

    Safe to run twice and concurrently, and on what a newer release made. Services that run meanwhile keep their
    connections.

    Raises: FedmeshError(CONFIG_INVALID) for missing or foreign roles or unreadable password files;
        (STORE_UNAVAILABLE) when PostgreSQL does not come up in time; (WRONG_STATE) as `migrate`.
    """
    passwords = _passwords(config)
    yield from _await_server(config)
    with psycopg.connect(conninfo(config.admin), autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        postgres_roles.create_roles(connection)
        for role, password in passwords.items():
            postgres_roles.set_password(connection, role, password)
        postgres_roles.create_database(connection, config.database)
        with psycopg.connect(make_conninfo(conninfo(config.admin), dbname=config.database)) as inside:
            postgres_roles.create_schemas(inside, config.database)
    yield f"database {config.database}: roles and schemas are there"
    for schema, folder in MIGRATIONS.items():
        applied = migrate(_as_migrator(config, schema), schema, folder)
        yield f"{schema}: applied {', '.join(applied)}" if applied else f"{schema}: up to date"


async def wait_for_schema(config: SchemaConfig) -> None:
    """Return when PostgreSQL is up and the schema has all migrations of this release.

    Raises: FedmeshError(STORE_UNAVAILABLE or WRONG_STATE) when that did not come about in time; NewerSchemaError at
        once for a schema of a newer release on which this one does not run.
    """
    folder = MIGRATIONS[config.schema_name]
    ending = time.monotonic() + config.patience_s
    database = Database(config.postgres)
    await database.open()
    try:
        while True:
            try:
                await require_migrated(database, config.schema_name, folder)
            except NewerSchemaError:
                raise
            except FedmeshError:
                if time.monotonic() >= ending:
                    raise
            except psycopg.Error as error:
                # The role or the schema is not there yet.
                if time.monotonic() >= ending:
                    raise FedmeshError(Code.STORE_UNAVAILABLE, f"the database is not prepared: {error}") from error
            else:
                return
            await asyncio.sleep(_PAUSE_S)
    finally:
        await database.close()


def _passwords(config: DatabaseConfig) -> dict[str, str]:
    if set(config.passwords) != set(postgres_roles.LOGIN_ROLES):
        raise FedmeshError(
            Code.CONFIG_INVALID, f"passwords must name exactly these roles: {', '.join(postgres_roles.LOGIN_ROLES)}"
        )
    return {role: read_secret(path) for role, path in config.passwords.items()}


def _await_server(config: DatabaseConfig) -> Iterator[str]:
    """Return when PostgreSQL answers. Yields why it does not, as often as that changes. Raises: as `prepare`."""
    ending = time.monotonic() + config.patience_s
    told = ""
    while True:
        try:
            with psycopg.connect(conninfo(config.admin), connect_timeout=5):
                return
        except psycopg.OperationalError as error:
            if time.monotonic() >= ending:
                raise FedmeshError(
                    Code.STORE_UNAVAILABLE, f"PostgreSQL did not come up in {config.patience_s:g} s: {error}"
                ) from error
            if (reason := str(error).strip()) != told:
                told = reason
                yield f"PostgreSQL does not answer yet: {reason}"
            time.sleep(_PAUSE_S)


def _as_migrator(config: DatabaseConfig, schema: str) -> PostgresConfig:
    role = f"{schema}_migrator"
    dsn = make_conninfo(config.admin.dsn, user=role, dbname=config.database)
    return PostgresConfig(dsn=dsn, password_file=config.passwords[role])
