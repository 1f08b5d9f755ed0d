"""The rows of a plan's cohort, staged as texts in DuckDB, from whatever source they come."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import duckdb
import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import SplitName
from services.hospital_node.sources.encoder import Cells
from services.hospital_node.sources.mapping import MappedColumn, PartitionFile, SourceMapping
from services.hospital_node.sources.table import (
    FILE_NUMBER,
    ROW_NUMBER,
    as_text,
    create_source,
    identifier,
    literal,
    reading,
    require_columns,
    sandbox,
)
from services.plans.manifest import PlanManifest
from services.plans.schema import FeatureSchema, source_column

SPLIT_TEXTS: Final = {
    "train": SplitName.TRAIN,
    "val": SplitName.VALIDATION,
    "validation": SplitName.VALIDATION,
    "test": SplitName.TEST,
}


class Source(Protocol):
    """Where encounters come from.

    `name` stands in messages; `files` are what DuckDB may open, and empty where rows are put in from outside;
    `scratch` is a folder for what does not fit into memory.
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def scratch(self) -> Path | None: ...

    def load(self, database: duckdb.DuckDBPyConnection, needed: list[str]) -> "Loaded":
        """Make the relation `source`: the `needed` columns as texts (NULL when empty), ROW_NUMBER from 1 within a file
        and FILE_NUMBER from 0.

        Raises: FedmeshError(DATA_INVALID, CONFIG_INVALID or STORE_UNAVAILABLE).
        """
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Within it, errors of DuckDB become DATA_INVALID and quote no row."""
        ...

    def digest(self, database: duckdb.DuckDBPyConnection) -> str:
        """SHA-256 in hex of what was loaded. Raises: FedmeshError(DATA_INVALID): it changed while it was read."""
        ...


@dataclass(frozen=True)
class Loaded:
    """`parts`: names of the files or tables that rows are counted in; `notes`: what was left out, for people."""

    parts: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """The table `cohort` in `database`, described.

    rows_read: rows of the source; in_cohort: rows left by the schema's exclusions; row_numbers: int64 [n], 1-based, and
    part_numbers: int64 [n], index into `parts`, of the rows that are this hospital's.
    """

    database: duckdb.DuckDBPyConnection
    manifest: PlanManifest
    digest: str
    rows_read: int
    in_cohort: int
    partitioned: bool
    parts: tuple[str, ...]
    notes: tuple[str, ...]
    row_numbers: NDArray[np.int64]
    part_numbers: NDArray[np.int64]

    def cells(self, name: str) -> Cells:
        """The column `name` (a schema column's), texts that mean "missing" as None."""
        text = identifier(name)
        missing = sorted(self.manifest.feature_schema.missing_values)
        if missing:
            text = f"CASE WHEN {text} IN ({', '.join(map(literal, missing))}) THEN NULL ELSE {text} END"
        # Found by DuckDB, distinct texts in the order of their first rows: no cell passes through Python.
        self.database.execute(
            f"CREATE OR REPLACE TABLE level AS SELECT text, row_number() OVER (ORDER BY first) - 1 AS position FROM "  # noqa: S608
            f"(SELECT {text} AS text, min(({FILE_NUMBER}, {ROW_NUMBER})) AS first FROM cohort GROUP BY 1)"
        )
        distinct: Any = self.database.execute("SELECT text FROM level ORDER BY position").fetchnumpy()["text"]
        index = self.database.execute(
            f"SELECT position FROM (SELECT {text} AS text, {FILE_NUMBER}, {ROW_NUMBER} FROM cohort) AS cells "  # noqa: S608
            f"JOIN level ON cells.text IS NOT DISTINCT FROM level.text ORDER BY {FILE_NUMBER}, {ROW_NUMBER}"
        ).fetchnumpy()["position"]
        return Cells(
            name=name,
            # A masked array, where there is a missing cell: its list has None there.
            distinct=tuple(distinct.tolist()),
            index=np.asarray(index, dtype=np.int64),
            row_numbers=self.row_numbers,
            part_numbers=self.part_numbers,
            parts=self.parts,
        )


@contextmanager
def open_cohort(
    source: Source,
    manifest: PlanManifest,
    mapping: SourceMapping | None = None,
    partition: PartitionFile | None = None,
) -> Iterator[Cohort]:
    """Stage the columns that the plan uses, the ids, the label and the exclusions' columns.

    Raises: FedmeshError(DATA_INVALID): not readable, empty, or columns missing (all are named);
        FedmeshError(CONFIG_INVALID): the mapping is for another schema; as `source.load`.
    """
    columns = local_columns(manifest, mapping)
    files = [*source.files, *([partition.path] if partition else [])]
    with sandbox(files, source.scratch) as database:
        loaded = source.load(database, list(dict.fromkeys(mapped.column for mapped in columns.values())))
        rows_read = _create_cohort(database, source, manifest.feature_schema, columns)
        in_cohort = _count(database, "cohort")
        if partition is not None:
            _apply_partition(database, partition)
        yield Cohort(
            database=database,
            manifest=manifest,
            digest=source.digest(database),
            rows_read=rows_read,
            in_cohort=in_cohort,
            partitioned=partition is not None,
            parts=loaded.parts,
            notes=loaded.notes,
            row_numbers=_numbers(database, ROW_NUMBER),
            part_numbers=_numbers(database, FILE_NUMBER),
        )


def local_columns(manifest: PlanManifest, mapping: SourceMapping | None) -> dict[str, MappedColumn]:
    """Schema column -> local column, for every column that is needed.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    schema = manifest.feature_schema
    mapped = {} if mapping is None else mapping.columns
    if mapping is not None:
        if mapping.feature_schema != schema.name:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the mapping is for schema {mapping.feature_schema!r}, the plan uses {schema.name!r}",
            )
        known = {schema.patient_id, schema.encounter_id, schema.label.name}
        known |= {source_column(column) for column in schema.columns} | {rule.name for rule in schema.exclude}
        unknown = sorted(set(mapped) - known)
        if unknown:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the mapping names columns that schema {schema.name!r} does not have: {', '.join(unknown)}",
            )
    needed = [schema.patient_id, schema.encounter_id, schema.label.name]
    needed += [source_column(column) for column in (*manifest.columns, *manifest.subgroup_columns)]
    needed += [rule.name for rule in schema.exclude]
    return {name: mapped.get(name, MappedColumn(column=name)) for name in dict.fromkeys(needed)}


def partition_columns(database: duckdb.DuckDBPyConnection, partition: PartitionFile) -> list[tuple[str, str]]:
    """Make the view `partition`; names and types of its columns for patient, hospital and split.

    Raises: FedmeshError(DATA_INVALID).
    """
    available = create_source(database, partition.path, "partition")
    wanted = [partition.patient_column, partition.hospital_column, partition.split_column]
    require_columns(partition.path.name, available, wanted)
    return [(name, available[name]) for name in wanted]


def rows_sha256(database: duckdb.DuckDBPyConnection) -> str:
    """SHA-256 in hex of the rows of `source`, in their order: for sources that are not one file."""
    digest = hashlib.sha256()
    rows = database.execute(f"SELECT * FROM source ORDER BY {FILE_NUMBER}, {ROW_NUMBER}")  # noqa: S608
    while batch := rows.fetchmany(10_000):
        # repr of a list of texts, None and whole numbers is one-to-one.
        digest.update(repr(batch).encode())
    return digest.hexdigest()


def _count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    row = database.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - a table name of this module
    return int(row[0]) if row else 0


def _create_cohort(
    database: duckdb.DuckDBPyConnection, source: Source, schema: FeatureSchema, columns: dict[str, MappedColumn]
) -> int:
    """Table `cohort`: schema column names, all texts, in file order, without excluded rows. Returns the rows read."""
    selected = []
    for name, mapped in columns.items():
        text = identifier(mapped.column)
        if mapped.values:
            cases = " ".join(f"WHEN {literal(local)} THEN {literal(meant)}" for local, meant in mapped.values.items())
            text = f"CASE {text} {cases} ELSE {text} END"
        selected.append(f"{text} AS {identifier(name)}")
    excluded = " OR ".join(
        f"coalesce({identifier(rule.name)} IN ({', '.join(literal(value) for value in rule.values)}), false)"
        for rule in schema.exclude
    )
    with source.reading():
        rows_read = _count(database, "source")
        if rows_read == 0:
            raise FedmeshError(Code.DATA_INVALID, f"{source.name} has {_empty(source)}")
        database.execute(
            f"CREATE TABLE cohort AS SELECT * FROM "  # noqa: S608
            f"(SELECT {', '.join(selected)}, {ROW_NUMBER}, {FILE_NUMBER} FROM source) "
            f"WHERE NOT ({excluded or 'false'}) ORDER BY {FILE_NUMBER}, {ROW_NUMBER}"
        )
    if _count(database, "cohort") == 0:
        raise FedmeshError(Code.DATA_INVALID, f"{source.name}: all {rows_read} rows are excluded by the schema's rules")
    return rows_read


def _empty(source: Source) -> str:
    return "a header but no rows" if source.files else "no encounter that the mapping takes: no finished inpatient stay"


def _apply_partition(database: duckdb.DuckDBPyConnection, partition: PartitionFile) -> None:
    """Keep the hospital's patients of `cohort`, with the partition's split as column `partition_split`."""
    path = partition.path
    patient, hospital, split = (as_text(*column) for column in partition_columns(database, partition))
    patient_id = identifier(database.execute("SELECT * FROM cohort LIMIT 0").description[0][0])
    with reading(path):
        database.execute(
            f"CREATE TABLE member AS SELECT {patient} AS patient, {split} AS split FROM partition "  # noqa: S608
            f"WHERE {hospital} = ?",
            [partition.hospital],
        )
        twice = database.execute("SELECT count(*) FROM (SELECT patient FROM member GROUP BY 1 HAVING count(*) > 1)")
        repeated = (twice.fetchone() or (0,))[0]
        unknown = database.execute(
            f"SELECT DISTINCT split FROM member WHERE split IS NULL OR split NOT IN "  # noqa: S608
            f"({', '.join(literal(text) for text in SPLIT_TEXTS)})"
        ).fetchall()
    if repeated:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: {repeated} patients appear more than once")
    if unknown:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: a split must be one of {', '.join(SPLIT_TEXTS)}")
    database.execute(
        "CREATE TABLE part AS SELECT cohort.*, member.split AS partition_split FROM cohort "  # noqa: S608
        f"JOIN member ON cohort.{patient_id} = member.patient ORDER BY {FILE_NUMBER}, {ROW_NUMBER}"
    )
    database.execute("DROP TABLE cohort")
    database.execute("ALTER TABLE part RENAME TO cohort")
    if _count(database, "cohort") == 0:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name} gives no patient to hospital {partition.hospital!r}")


def _numbers(database: duckdb.DuckDBPyConnection, name: str) -> NDArray[np.int64]:
    query = f"SELECT {identifier(name)} AS number FROM cohort ORDER BY {FILE_NUMBER}, {ROW_NUMBER}"  # noqa: S608
    return np.asarray(database.execute(query).fetchnumpy()["number"], dtype=np.int64)
