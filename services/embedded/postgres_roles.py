"""Databases, schemas, roles and privileges of the embedded PostgreSQL."""

from typing import Any, Final

import psycopg
from psycopg import sql

SCHEMAS: Final = ("registry", "audit")
"""One schema for each service that stores in PostgreSQL, of the same name."""

LOGIN_ROLES: Final = tuple(f"{schema}_{part}" for schema in SCHEMAS for part in ("migrator", "service"))

Connection = psycopg.Connection[tuple[Any, ...]]


def create_roles(connection: Connection) -> None:
    """Create the roles of every schema, where missing, and set their attributes. They belong to the whole cluster."""
    connection.execute("REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC")
    for schema in SCHEMAS:
        for statement in _role_statements(schema):
            connection.execute(statement)


def set_password(connection: Connection, role: str, password: str) -> None:
    """Set a role's password; sent as a SCRAM verifier, so that it can appear in no server log."""
    verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier)))


def create_database(connection: Connection, database: str) -> None:
    """Create a database unless it exists. The connection must be in autocommit mode."""
    if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))


def create_schemas(connection: Connection, database: str) -> None:
    """Create every schema in the connected database and close all that is not granted.

    A service may enter its own schema and no other. What it may do to a table is for that table's migration to grant.
    """
    run = connection.execute
    run(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    run("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    for schema in SCHEMAS:
        names = {part: sql.Identifier(f"{schema}_{part}") for part in ("owner", "migrator", "service")}
        names |= {"schema": sql.Identifier(schema), "database": sql.Identifier(database)}
        run(sql.SQL("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {owner}").format(**names))
        run(sql.SQL("REVOKE ALL ON SCHEMA {schema} FROM PUBLIC").format(**names))
        run(sql.SQL("GRANT USAGE ON SCHEMA {schema} TO {service}").format(**names))
        run(
            sql.SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC").format(**names)
        )
        run(sql.SQL("GRANT CONNECT ON DATABASE {database} TO {migrator}, {service}").format(**names))


def _role_statements(schema: str) -> list[sql.Composed]:
    """SQL that makes the three roles of a schema: its owner, who migrates it, and the service that uses it."""
    names = {part: sql.Identifier(f"{schema}_{part}") for part in ("owner", "migrator", "service")}
    names["schema"] = sql.Identifier(schema)
    create = "DO $$ BEGIN CREATE ROLE {}; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    plain = "NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"
    created = [sql.SQL(create).format(names[part]) for part in ("owner", "migrator", "service")]
    texts = (
        f"ALTER ROLE {{owner}} NOLOGIN {plain}",
        f"ALTER ROLE {{migrator}} LOGIN {plain}",
        f"ALTER ROLE {{service}} LOGIN {plain}",
        "GRANT {owner} TO {migrator}",
        # What the migrator creates belongs to the owner, who cannot sign in.
        "ALTER ROLE {migrator} SET role = {owner}",
        "ALTER ROLE {migrator} SET search_path = {schema}",
        "ALTER ROLE {service} SET search_path = {schema}",
    )
    return created + [sql.SQL(text).format(**names) for text in texts]
