"""A hospital's PostgreSQL in the layout of the OMOP Common Data Model, version 5.4, as a source.

The tables' columns that the mapping reads are copied into DuckDB in one read-only transaction, row by row, and mapped
there: what is computed does not depend on the database's version or settings, and nothing is written to it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Final

import duckdb
import psycopg
from psycopg import sql

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import Loaded, rows_sha256
from services.hospital_node.sources.staging import (
    Row,
    StagedTable,
    create_table,
    insert_rows,
    mapping_errors,
    notes_of,
    run_mapping,
    set_extract,
)

_INTEGER: Final = "BIGINT"
_TABLES: Final = (
    StagedTable(
        "person",
        {
            "person_id": _INTEGER,
            "gender_concept_id": _INTEGER,
            "year_of_birth": _INTEGER,
            "month_of_birth": _INTEGER,
            "day_of_birth": _INTEGER,
            "race_concept_id": _INTEGER,
            "ethnicity_concept_id": _INTEGER,
        },
    ),
    StagedTable(
        "visit_occurrence",
        {
            "visit_occurrence_id": _INTEGER,
            "person_id": _INTEGER,
            "visit_concept_id": _INTEGER,
            "visit_type_concept_id": _INTEGER,
            "visit_start_date": "DATE",
            "visit_end_date": "DATE",
            "admitted_from_concept_id": _INTEGER,
            "discharged_to_concept_id": _INTEGER,
        },
    ),
    StagedTable(
        "condition_occurrence",
        {
            "condition_occurrence_id": _INTEGER,
            "visit_occurrence_id": _INTEGER,
            "condition_status_concept_id": _INTEGER,
            "condition_source_value": "VARCHAR",
            "condition_source_concept_id": _INTEGER,
        },
    ),
    StagedTable(
        "drug_exposure",
        {
            "drug_exposure_id": _INTEGER,
            "visit_occurrence_id": _INTEGER,
            "drug_concept_id": _INTEGER,
            "drug_exposure_start_date": "DATE",
            "quantity": "DOUBLE",
            "days_supply": _INTEGER,
            "drug_source_value": "VARCHAR",
        },
    ),
    StagedTable(
        "measurement",
        {
            "measurement_id": _INTEGER,
            "visit_occurrence_id": _INTEGER,
            "measurement_concept_id": _INTEGER,
            "value_as_number": "DOUBLE",
            "unit_concept_id": _INTEGER,
        },
    ),
    StagedTable("observation_period", {"person_id": _INTEGER, "observation_period_end_date": "DATE"}),
    StagedTable("death", {"person_id": _INTEGER, "death_date": "DATE"}),
    StagedTable(
        "concept",
        {
            "concept_id": _INTEGER,
            "concept_name": "VARCHAR",
            "vocabulary_id": "VARCHAR",
            "concept_class_id": "VARCHAR",
            "concept_code": "VARCHAR",
        },
    ),
    StagedTable("procedure_occurrence", {"procedure_occurrence_id": _INTEGER, "visit_occurrence_id": _INTEGER}, True),
)
# The vocabulary has millions of rows: only the concepts that these columns name are read.
_CONCEPTS_OF: Final = (
    ("condition_occurrence", "condition_source_concept_id"),
    ("drug_exposure", "drug_concept_id"),
    ("measurement", "measurement_concept_id"),
    ("measurement", "unit_concept_id"),
)
_NOTES: Final = (
    ("visit_occurrence", "visit_end_date < visit_start_date", "visits end before they begin"),
    (
        "visit_occurrence",
        "visit_start_date > (SELECT until FROM extract)",
        "visits begin after the last day that counts (data.until, or today)",
    ),
)
_VERSION: Final = "5.4"
_ROWS_AT_ONCE: Final = 10_000


@dataclass(frozen=True)
class OmopSource:
    """`dsn` is secret: it may hold the password. `mapping` is SQL, called `mapping_name` in messages.

    With `until`, what was recorded for later days is left out, so that the rows stay the same while the database grows.
    """

    dsn: str
    schema: str
    vocabulary_schema: str
    mapping: str
    mapping_name: str
    until: date | None
    scratch: Path | None
    connect_timeout_s: int
    statement_timeout_s: int

    def __repr__(self) -> str:
        return f"OmopSource(schema={self.schema!r})"

    @property
    def name(self) -> str:
        return f"the OMOP database (schema {self.schema!r})"

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def load(self, database: duckdb.DuckDBPyConnection, needed: list[str]) -> Loaded:
        """See `Source.load`.

        Raises: FedmeshError: CONFIG_INVALID for a missing or foreign table, another version of the model, no
            permission, or wrong SQL; STORE_UNAVAILABLE when the database cannot be reached or takes too long;
            DATA_INVALID for values that cannot be mapped.
        """
        with _transaction(self) as connection:
            present = self._check_layout(connection)
            for table in _TABLES:
                create_table(database, table)
                if table.name in present:
                    insert_rows(database, table, self._rows(connection, table))
        set_extract(database, self.until, "procedure_occurrence" in present)
        loaded = run_mapping(database, self.mapping, self.mapping_name, needed, self.name)
        return replace(loaded, notes=tuple(notes_of(database, _NOTES)))

    def reading(self) -> AbstractContextManager[None]:
        """See `Source.reading`."""
        return mapping_errors(self.mapping_name)

    def digest(self, database: duckdb.DuckDBPyConnection) -> str:
        """SHA-256 of the mapped rows: the database has no bytes of its own that could be hashed."""
        return rows_sha256(database)

    def _schema_of(self, table: str) -> str:
        return self.vocabulary_schema if table == "concept" else self.schema

    def _check_layout(self, connection: "psycopg.Connection[tuple[object, ...]]") -> set[str]:
        """Names of the tables that are there. Raises: FedmeshError(CONFIG_INVALID)."""
        found: dict[tuple[str, str], set[str]] = {}
        # Not information_schema, which hides what the role may not read: a missing table is another fault.
        rows = connection.execute(
            "SELECT n.nspname, c.relname, a.attname FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
            "WHERE n.nspname = ANY(%s) AND c.relkind IN ('r', 'v', 'm', 'p', 'f')",
            [[self.schema, self.vocabulary_schema]],
        )
        for schema, table, column in rows:
            found.setdefault((str(schema), str(table)), set()).add(str(column))
        present = {table.name for table in _TABLES if (self._schema_of(table.name), table.name) in found}
        missing = [
            f"{self._schema_of(table.name)}.{table.name}"
            for table in _TABLES
            if table.name not in present and not table.optional
        ]
        if missing:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the OMOP database lacks {', '.join(missing)}; data.omop.cdm_schema is {self.schema!r}: is that the "
                "schema of the Common Data Model?",
            )
        self._check_version(connection, found)
        for table in _TABLES:
            lacking = sorted(set(table.columns) - found.get((self._schema_of(table.name), table.name), set()))
            if table.name in present and lacking:
                raise FedmeshError(Code.CONFIG_INVALID, _wrong_version(f"{table.name} lacks {', '.join(lacking)}"))
        return present

    def _check_version(
        self, connection: "psycopg.Connection[tuple[object, ...]]", found: dict[tuple[str, str], set[str]]
    ) -> None:
        visits = found[self.schema, "visit_occurrence"]
        if "discharge_to_concept_id" in visits and "discharged_to_concept_id" not in visits:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                _wrong_version("visit_occurrence has discharge_to_concept_id, as versions up to 5.3 had"),
            )
        if "cdm_version" not in found.get((self.schema, "cdm_source"), set()):
            return
        query = sql.SQL("SELECT cdm_version FROM {}").format(sql.Identifier(self.schema, "cdm_source"))
        told = {str(row[0]).lower().removeprefix("v").strip() for row in connection.execute(query) if row[0]}
        other = sorted(version for version in told if not f"{version}.".startswith(f"{_VERSION}."))
        if other:
            raise FedmeshError(Code.CONFIG_INVALID, _wrong_version(f"cdm_source says {', '.join(other)}"))

    def _rows(self, connection: "psycopg.Connection[tuple[object, ...]]", table: StagedTable) -> Iterator[Row]:
        """The table's rows as texts, streamed: neither side holds the whole table."""
        columns = sql.SQL(", ").join(sql.SQL("CAST({} AS text)").format(sql.Identifier(name)) for name in table.columns)
        query = sql.SQL("SELECT {} FROM {}").format(columns, sql.Identifier(self._schema_of(table.name), table.name))
        if table.name == "concept":
            used = sql.SQL(" UNION ").join(
                sql.SQL("SELECT {} FROM {}").format(sql.Identifier(column), sql.Identifier(self.schema, name))
                for name, column in _CONCEPTS_OF
            )
            query = sql.SQL("{} WHERE concept_id IN ({})").format(query, used)
        with connection.cursor(name=f"fedmesh_{table.name}") as cursor:
            cursor.itersize = _ROWS_AT_ONCE
            cursor.execute(query)
            yield from cursor


def _wrong_version(why: str) -> str:
    return f"the OMOP database is not in the layout of version {_VERSION}: {why}; migrate it, or map it with views"


@contextmanager
def _transaction(source: OmopSource) -> Iterator["psycopg.Connection[tuple[object, ...]]"]:
    """One read-only snapshot of the database, ended without a trace. Messages never quote the connection string."""
    try:
        with psycopg.connect(
            source.dsn,
            connect_timeout=source.connect_timeout_s,
            application_name="fedmesh",
            options=f"-c statement_timeout={source.statement_timeout_s}s -c default_transaction_read_only=on "
            "-c DateStyle=ISO",
        ) as connection:
            connection.read_only = True
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield connection
            connection.rollback()
    except psycopg.errors.InsufficientPrivilege as error:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"the OMOP database refuses to be read: {error.diag.message_primary}; the role needs USAGE on the schema "
            "and SELECT on the tables of the Common Data Model",
        ) from None
    except psycopg.errors.QueryCanceled:
        raise FedmeshError(
            Code.STORE_UNAVAILABLE,
            f"the OMOP database took longer than data.omop.statement_timeout_s = {source.statement_timeout_s} s for "
            "one statement",
        ) from None
    except psycopg.OperationalError as error:
        # libpq's text names host, port and role, never the password.
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"the OMOP database cannot be reached: {first}") from None
    except (psycopg.ProgrammingError, psycopg.InternalError) as error:
        # Without a message of the server: a connection string that libpq cannot parse, which it would quote.
        primary = error.diag.message_primary or "its connection string (data.omop.dsn_file) is not valid"
        raise FedmeshError(Code.CONFIG_INVALID, f"the OMOP database cannot be read: {primary}") from None
    except psycopg.Error as error:
        # Errors of other classes may quote a value.
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"the OMOP database cannot be read: {type(error).__name__}; its log has the particulars",
        ) from None
