"""A synthetic Parquet file in the vocabulary of a plan's schema, made by DuckDB in seconds. Nobody in it exists.

Every cell follows from the numbers of its patient, its encounter and its column by a hash, and is one of the texts
that the schema allows, all equally often. It measures how fast a hospital reads and computes, and says nothing about
medicine.
"""

from pathlib import Path
from typing import Final

import duckdb

from services.demo.storage import storing
from services.hospital_node.sources.table import interruptible
from services.plans.manifest import PlanManifest
from services.plans.schema import Categorical, Column, Flag, source_column

# Share of patients with at least one more encounter; there are at most MOST_STAYS.
_ANOTHER: Final = 0.28
MOST_STAYS: Final = 6
_POSITIVE: Final = 0.11
_MOST_NUMBERS: Final = 100
# Where a column only decides about exclusion.
_KEPT: Final = "kept"
_MEMORY_LIMIT: Final = "512MB"


def write_hospital(path: Path, manifest: PlanManifest, patients: int) -> int:
    """Write one hospital of `patients` patients with all columns of the plan's schema, all texts; its encounters.

    Raises: FedmeshError(STORE_FULL, CONFIG_INVALID) when the file cannot be written.
    """
    schema = manifest.feature_schema
    columns = {source_column(column): texts(column) for column in reversed(schema.columns)}
    for rule in schema.exclude:
        kept = [text for text in columns.get(rule.name, [_KEPT]) if text not in rule.values]
        columns[rule.name] = kept or [_KEPT]
    # Ids are numbers as text, as in the public data.
    selected = [
        f'CAST(50000000 + {MOST_STAYS} * patient + stay AS VARCHAR) AS "{schema.encounter_id}"',
        f'CAST(1000000 + patient AS VARCHAR) AS "{schema.patient_id}"',
        f'{_outcome(manifest)} AS "{schema.label.name}"',
        *(f'{_drawn(allowed, number)} AS "{name}"' for number, (name, allowed) in enumerate(columns.items())),
    ]
    target = path.as_posix().replace("'", "''")
    with storing(path.parent), interruptible(), duckdb.connect() as database:
        database.execute(f"SET memory_limit = '{_MEMORY_LIMIT}'")
        database.execute("SET enable_progress_bar = false")
        written = database.execute(
            f"COPY (SELECT {', '.join(selected)} FROM (SELECT patient, unnest(range({_stays()})) AS stay "  # noqa: S608
            f"FROM range({patients}) AS patients(patient))) TO '{target}' (FORMAT parquet)"
        ).fetchone()
    return int(written[0]) if written else 0


def texts(column: Column) -> list[str]:
    """Cell texts that a schema column allows, at most some hundred."""
    if isinstance(column, Flag):
        return [*column.true, *column.false]
    if isinstance(column, Categorical):
        return [text for level in column.levels for text in (*level.values, *(f"{low:g}" for low, _ in level.ranges))]
    if column.values:
        return list(column.values)
    step = max(1.0, (column.maximum - column.minimum) / _MOST_NUMBERS)
    count = 1 + int((column.maximum - column.minimum) / step)
    return [f"{column.minimum + number * step:g}" for number in range(count)]


def _uniform(*what: str) -> str:
    """SQL for a number in [0, 1) that follows from `what`."""
    return f"(hash({', '.join(what)}) / 18446744073709551616.0)"


def _stays() -> str:
    """SQL for the number of a patient's encounters: geometric, at least one."""
    cases = " ".join(
        f"WHEN {_uniform('patient', '-1')} < {_ANOTHER**more:.9f} THEN {more + 1}"
        for more in range(MOST_STAYS - 1, 0, -1)
    )
    return f"CASE {cases} ELSE 1 END"


def _drawn(allowed: list[str], number: int) -> str:
    """SQL for one of the allowed texts."""
    listed = ", ".join("'" + text.replace("'", "''") + "'" for text in allowed)
    return f"list_extract([{listed}], 1 + CAST(hash(patient, stay, {number}) % {len(allowed)} AS INTEGER))"


def _outcome(manifest: PlanManifest) -> str:
    label = manifest.feature_schema.label
    drawn = _uniform("patient", "stay", "-2")
    positive, negative = ("'" + side[0].replace("'", "''") + "'" for side in (label.positive, label.negative))
    return f"CASE WHEN {drawn} < {_POSITIVE} THEN {positive} ELSE {negative} END"
