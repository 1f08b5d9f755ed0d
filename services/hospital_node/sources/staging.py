"""Rows from outside DuckDB, put into its tables batch by batch, and mapped there to the plan's schema by SQL."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import Loaded
from services.hospital_node.sources.table import (
    FILE_NUMBER,
    ROW_NUMBER,
    as_text,
    identifier,
    require_columns,
)

MAPPINGS: Final = Path(__file__).parent / "mappings"
_ENCOUNTERS: Final = "encounters"
_BATCH_ROWS: Final = 20_000

Row = Sequence[object]


@dataclass(frozen=True)
class StagedTable:
    """A table that the mapping reads: column -> DuckDB type."""

    name: str
    columns: dict[str, str]
    optional: bool = False


def create_table(database: duckdb.DuckDBPyConnection, table: StagedTable) -> None:
    """Make the empty table."""
    columns = ", ".join(f"{identifier(name)} {sql_type}" for name, sql_type in table.columns.items())
    database.execute(f"CREATE TABLE {identifier(table.name)} ({columns})")


def insert_rows(database: duckdb.DuckDBPyConnection, table: StagedTable, rows: Iterable[Row]) -> int:
    """Put rows of texts or None into the table, in bounded memory; returns how many.

    Raises: FedmeshError(DATA_INVALID): a text is not of its column's type.
    """
    total = 0
    casts = ", ".join(f"CAST({identifier(name)} AS {sql_type})" for name, sql_type in table.columns.items())
    for batch in _batches(rows):
        columns = list(zip(*batch, strict=True))
        database.register(
            "batch",
            {name: np.array(values, dtype=object) for name, values in zip(table.columns, columns, strict=True)},
        )
        try:
            database.execute(f"INSERT INTO {identifier(table.name)} SELECT {casts} FROM batch")  # noqa: S608
        except duckdb.ConversionException:
            # DuckDB's message quotes the cell.
            raise FedmeshError(
                Code.DATA_INVALID,
                f"{table.name}: a value among rows {total + 1} to {total + len(batch)} is not of its column's type "
                f"({', '.join(f'{name} {sql_type}' for name, sql_type in table.columns.items())})",
            ) from None
        finally:
            database.unregister("batch")
        total += len(batch)
    return total


def set_extract(database: duckdb.DuckDBPyConnection, until: date | None, has_procedures: bool) -> None:
    """The relation `extract` of one row: what the mapping must know about the data as a whole.

    No data reaches further than today, whatever a mistyped year or an open-ended period of observation says.
    """
    today = datetime.now().astimezone().date()
    database.execute("CREATE TABLE extract (until DATE, has_procedures BOOLEAN)")
    database.execute("INSERT INTO extract VALUES (?, ?)", [min(until or today, today), has_procedures])


def count_rows(database: duckdb.DuckDBPyConnection, table: str, rule: str) -> int:
    """How many rows of a table a condition is true of; both are texts of this package."""
    row = database.execute(f"SELECT count(*) FROM {table} WHERE {rule}").fetchone()  # noqa: S608
    return int(row[0]) if row else 0


def notes_of(database: duckdb.DuckDBPyConnection, rules: Iterable[tuple[str, str, str]]) -> list[str]:
    """What was left out, and how often, for people; rules: table, condition and what it means."""
    return [f"{count} {text}" for table, rule, text in rules if (count := count_rows(database, table, rule))]


def run_mapping(
    database: duckdb.DuckDBPyConnection, mapping: str, what: str, schema_columns: list[str], part: str
) -> Loaded:
    """Run the mapping's statements, which leave a relation `encounters`, and make `source` of it.

    Raises: FedmeshError(CONFIG_INVALID): the SQL is wrong or leaves no such relation; FedmeshError(DATA_INVALID): it
        lacks columns, or a value cannot be converted.
    """
    with mapping_errors(what):
        database.execute(mapping)
        described = database.execute(f"DESCRIBE {_ENCOUNTERS}").fetchall()
        available = {str(name): str(sql_type) for name, sql_type, *_ in described}
        require_columns(f"the relation {_ENCOUNTERS!r} of {what}", available, schema_columns)
        texts = [as_text(name, available[name]) for name in schema_columns]
        named = [f"{text} AS {identifier(name)}" for text, name in zip(texts, schema_columns, strict=True)]
        # By all columns: the same data gives the same rows in the same order, whatever order they came in.
        database.execute(
            f"CREATE TABLE source AS SELECT {', '.join(named)}, "  # noqa: S608
            f"row_number() OVER (ORDER BY {', '.join(texts)}) AS {ROW_NUMBER}, 0 AS {FILE_NUMBER} FROM {_ENCOUNTERS}"
        )
    return Loaded((part,))


@contextmanager
def mapping_errors(what: str) -> Iterator[None]:
    """DuckDB's complaints about the mapping, told as far as they quote no cell."""
    try:
        yield
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
        first = str(error).strip().splitlines()[0]
        raise FedmeshError(Code.CONFIG_INVALID, f"{what} cannot be run: {first}") from None
    except duckdb.OutOfMemoryException:
        raise FedmeshError(
            Code.DATA_INVALID, f"{what} needs more space than there is: look at the free space of the scratch folder"
        ) from None
    except duckdb.Error as error:
        raise FedmeshError(
            Code.DATA_INVALID, f"{what} failed on these rows: {type(error).__name__}; the value is not shown"
        ) from None


def shipped_mapping(source: str, schema: str) -> str:
    """The mapping that ships with fedmesh, as one SQL text: `source` is omop or fhir.

    Raises: FedmeshError(CONFIG_INVALID) when there is none for this schema.
    """
    files = [MAPPINGS / schema / f"{source}.sql", MAPPINGS / schema / "encounters.sql"]
    if not all(path.is_file() for path in files):
        raise FedmeshError(
            Code.CONFIG_INVALID, f"no mapping of {source} data ships for schema {schema!r}: name your own in data.sql"
        )
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
