"""Reads a local Parquet or CSV file through DuckDB into a validated Dataset."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.sources.encoder import Cells, encode, encode_label, require_present
from services.hospital_node.sources.mapping import MappedColumn, PartitionFile, SourceMapping
from services.hospital_node.sources.standardise import standardised
from services.hospital_node.sources.table import (
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
from services.plans.schema import FeatureSchema, Split, source_column

_SPLIT_TEXTS: Final = {
    "train": SplitName.TRAIN,
    "val": SplitName.VALIDATION,
    "validation": SplitName.VALIDATION,
    "test": SplitName.TEST,
}


def read_dataset(
    path: Path | str,
    manifest: PlanManifest,
    mapping: SourceMapping | None = None,
    partition: PartitionFile | None = None,
) -> Dataset:
    """Read `path` (Parquet or CSV, told apart by content) as the plan's features, standardised as the plan says.

    Only the columns that the plan uses, the ids, the label and the exclusions' columns are read. Cells of rows outside
    the cohort are not checked.

    Raises: FedmeshError(DATA_INVALID): not readable, neither Parquet nor CSV, empty, columns missing (all are named),
        cells that the schema does not allow (column, count and a row number, never a value), an encounter id twice,
        or the file changed while it was read. FedmeshError(CONFIG_INVALID): the mapping is for another schema.
    """
    with open_cohort(path, manifest, mapping, partition) as cohort:
        return cohort.dataset()


@dataclass(frozen=True)
class Cohort:
    """The rows of a file that take part, as texts in a database of their own; made by `open_cohort`."""

    database: duckdb.DuckDBPyConnection
    manifest: PlanManifest
    content_sha256: str
    rows_read: int
    rows_in_cohort: int
    partitioned: bool

    def dataset(self) -> Dataset:
        """The rows as the plan's features, standardised as the plan says. Raises: FedmeshError(DATA_INVALID)."""
        dataset = _encode_cohort(self)
        return standardised(dataset) if self.manifest.standardisation == "local" else dataset


@contextmanager
def open_cohort(
    path: Path | str,
    manifest: PlanManifest,
    mapping: SourceMapping | None = None,
    partition: PartitionFile | None = None,
) -> Iterator[Cohort]:
    """Read `path` once, for as long as the block lasts. Raises: as `read_dataset`."""
    path = Path(path)
    columns = _local_columns(manifest, mapping)
    digest = _sha256(path)
    with sandbox([path, *([partition.path] if partition else [])]) as database:
        rows_read = _create_cohort(database, path, manifest.feature_schema, columns)
        in_cohort = _count(database, "cohort")
        if partition is not None:
            _apply_partition(database, partition)
        if _sha256(path) != digest:
            raise FedmeshError(
                Code.DATA_INVALID, f"{path.name} changed while it was read; read it again once it is complete"
            )
        yield Cohort(database, manifest, digest, rows_read, in_cohort, partition is not None)


def check_columns(path: Path, manifest: PlanManifest, partition: PartitionFile) -> None:
    """Whether both files have every column that the plan and the partition need; their rows are not looked at.

    Raises: FedmeshError(DATA_INVALID), as `read_dataset`.
    """
    with sandbox([path, partition.path]) as database:
        needed = [mapped.column for mapped in _local_columns(manifest, None).values()]
        require_columns(path, create_source(database, path, "source"), needed)
        _partition_columns(database, partition)


def needed_columns(manifest: PlanManifest) -> tuple[str, ...]:
    """The schema's names of all columns that are read for a plan."""
    return tuple(_local_columns(manifest, None))


def _local_columns(manifest: PlanManifest, mapping: SourceMapping | None) -> dict[str, MappedColumn]:
    """Schema column -> local column, for every column that is needed."""
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
    needed += [source_column(column) for column in manifest.columns]
    needed += [rule.name for rule in schema.exclude]
    return {name: mapped.get(name, MappedColumn(column=name)) for name in dict.fromkeys(needed)}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path.name}: {error.strerror}") from error


def _count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    row = database.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - a table name of this module
    return int(row[0]) if row else 0


def _create_cohort(
    database: duckdb.DuckDBPyConnection, path: Path, schema: FeatureSchema, columns: dict[str, MappedColumn]
) -> int:
    """Table `cohort`: schema column names, all texts, without excluded rows, in any order. Returns the rows read."""
    available = create_source(database, path, "source")
    require_columns(path, available, list(dict.fromkeys(mapped.column for mapped in columns.values())))
    selected = []
    for name, mapped in columns.items():
        text = as_text(mapped.column, available[mapped.column])
        if mapped.values:
            cases = " ".join(f"WHEN {literal(local)} THEN {literal(meant)}" for local, meant in mapped.values.items())
            text = f"CASE {text} {cases} ELSE {text} END"
        selected.append(f"{text} AS {identifier(name)}")
    excluded = " OR ".join(
        f"coalesce({identifier(rule.name)} IN ({', '.join(literal(value) for value in rule.values)}), false)"
        for rule in schema.exclude
    )
    with reading(path):
        rows_read = _count(database, "source")
        if rows_read == 0:
            raise FedmeshError(Code.DATA_INVALID, f"{path.name} has a header but no rows")
        database.execute(
            f"CREATE TABLE cohort AS SELECT * FROM (SELECT {', '.join(selected)}, {ROW_NUMBER} FROM source) "  # noqa: S608
            f"WHERE NOT ({excluded or 'false'})"
        )
    if _count(database, "cohort") == 0:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: all {rows_read} rows are excluded by the schema's rules")
    return rows_read


def _apply_partition(database: duckdb.DuckDBPyConnection, partition: PartitionFile) -> None:
    """Keep the hospital's patients of `cohort`, with the partition's split as column `partition_split`."""
    path = partition.path
    patient, hospital, split = (as_text(*column) for column in _partition_columns(database, partition))
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
            f"({', '.join(literal(text) for text in _SPLIT_TEXTS)})"
        ).fetchall()
    if repeated:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: {repeated} patients appear more than once")
    if unknown:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name}: a split must be one of {', '.join(_SPLIT_TEXTS)}")
    database.execute(
        "CREATE TABLE part AS SELECT cohort.*, member.split AS partition_split FROM cohort "  # noqa: S608
        f"JOIN member ON cohort.{patient_id} = member.patient"
    )
    database.execute("DROP TABLE cohort")
    database.execute("ALTER TABLE part RENAME TO cohort")
    if _count(database, "cohort") == 0:
        raise FedmeshError(Code.DATA_INVALID, f"{path.name} gives no patient to hospital {partition.hospital!r}")


def _partition_columns(database: duckdb.DuckDBPyConnection, partition: PartitionFile) -> list[tuple[str, str]]:
    """Make the view `partition`; names and types of its columns for patient, hospital and split."""
    available = create_source(database, partition.path, "partition")
    wanted = [partition.patient_column, partition.hospital_column, partition.split_column]
    require_columns(partition.path, available, wanted)
    return [(name, available[name]) for name in wanted]


def _encode_cohort(cohort: Cohort) -> Dataset:
    database, manifest = cohort.database, cohort.manifest
    schema = manifest.feature_schema
    numbers = database.execute(f"SELECT {ROW_NUMBER} FROM cohort ORDER BY 1").fetchnumpy()[ROW_NUMBER]  # noqa: S608
    row_numbers = np.asarray(numbers, dtype=np.int64)
    missing = frozenset(schema.missing_values)

    def cells(name: str) -> Cells:
        return _cells(database, name, row_numbers, missing)

    encounters, patients = cells(schema.encounter_id), cells(schema.patient_id)
    require_present(encounters)
    require_present(patients)
    _require_distinct(encounters)
    if cohort.partitioned:
        splits = cells("partition_split")
        table = np.array([_SPLIT_TEXTS[text or ""] for text in splits.distinct], dtype=np.int8)
        split = table[splits.index]
    else:
        table = np.array([_hashed_split(schema.split, text or "") for text in patients.distinct], dtype=np.int8)
        split = table[patients.index]
    return Dataset(
        feature_names=manifest.feature_names,
        x=np.concatenate([encode(column, cells(source_column(column))) for column in manifest.columns], axis=1),
        y=encode_label(schema.label, cells(schema.label.name)),
        patient=_dense_within(split, patients.index),
        split=split,
        encounter_ids=_texts(encounters),
        patient_ids=_texts(patients),
        content_sha256=cohort.content_sha256,
        rows_read=cohort.rows_read,
        rows_excluded=cohort.rows_read - cohort.rows_in_cohort,
        rows_elsewhere=cohort.rows_in_cohort - len(split),
    )


def _cells(
    database: duckdb.DuckDBPyConnection, name: str, row_numbers: NDArray[np.int64], missing: frozenset[str]
) -> Cells:
    """A column's distinct texts in the order of their first rows, found by DuckDB: no cell passes through Python."""
    text = identifier(name)
    if missing:
        text = f"CASE WHEN {text} IN ({', '.join(map(literal, sorted(missing)))}) THEN NULL ELSE {text} END"
    database.execute(
        f"CREATE OR REPLACE TABLE level AS SELECT text, row_number() OVER (ORDER BY first) - 1 AS position FROM "  # noqa: S608
        f"(SELECT {text} AS text, min({ROW_NUMBER}) AS first FROM cohort GROUP BY 1)"
    )
    distinct: Any = database.execute("SELECT text FROM level ORDER BY position").fetchnumpy()["text"]
    index = database.execute(
        f"SELECT position FROM (SELECT {text} AS text, {ROW_NUMBER} FROM cohort) AS cells "  # noqa: S608
        f"JOIN level ON cells.text IS NOT DISTINCT FROM level.text ORDER BY {ROW_NUMBER}"
    ).fetchnumpy()["position"]
    # A masked array, where there is a missing cell: its list has None there.
    return Cells(
        name=name,
        distinct=tuple(distinct.tolist()),
        index=np.asarray(index, dtype=np.int64),
        row_numbers=row_numbers,
    )


def _texts(cells: Cells) -> NDArray[np.object_]:
    return np.array(cells.distinct, dtype=np.object_)[cells.index]


def _require_distinct(cells: Cells) -> None:
    repeats = len(cells.index) - len(cells.distinct)
    if repeats:
        seen = np.zeros(len(cells.distinct), dtype=bool)
        for row, position in zip(cells.row_numbers, cells.index, strict=True):
            if seen[position]:
                raise FedmeshError(
                    Code.DATA_INVALID,
                    f"column {cells.name!r}: {repeats} row{'s repeat' if repeats > 1 else ' repeats'} the encounter id "
                    f"of an earlier row; for example data row {row}",
                    column=cells.name,
                    count=repeats,
                    row=row,
                )
            seen[position] = True


def _hashed_split(split: Split, patient_id: str) -> SplitName:
    """A uniform number from SHA-256(salt, patient id): the same patient is on the same side at every hospital."""
    digest = hashlib.sha256(f"{split.salt}\n{patient_id}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") / 2**64
    if number < split.train:
        return SplitName.TRAIN
    return SplitName.VALIDATION if number < split.train + split.validation else SplitName.TEST


def _dense_within(split: NDArray[np.int8], patient: NDArray[np.int64]) -> NDArray[np.int64]:
    """Patient numbers that run from 0 without gaps within each split."""
    dense = np.empty(len(patient), dtype=np.int64)
    for side in SplitName:
        mask = split == side
        dense[mask] = np.unique(patient[mask], return_inverse=True)[1]
    return dense
