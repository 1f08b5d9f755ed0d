"""Reads a source through DuckDB into a validated Dataset."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import (
    SPLIT_TEXTS,
    Cohort,
    Source,
    local_columns,
    open_cohort,
    partition_columns,
)
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.sources.encoder import Cells, encode, encode_group, encode_label, require_present
from services.hospital_node.sources.files import FileSource
from services.hospital_node.sources.mapping import PartitionFile, SourceMapping
from services.hospital_node.sources.standardise import standardised
from services.hospital_node.sources.table import create_source, require_columns, sandbox
from services.plans.manifest import PlanManifest
from services.plans.schema import Split, source_column

# From so many rows on, an outcome that never varies is a mistake in the data or its mapping, not chance: with one
# readmission in nine it would be chance once in 34 times at 30 rows, and once in 130,000 at 100.
ROWS_WITH_BOTH_OUTCOMES: Final = 30

T = TypeVar("T")


@dataclass
class Problems:
    """What makes the data unusable for the plan, in the order in which it was found."""

    found: list[FedmeshError] = field(default_factory=list)

    def attempt(self, function: Callable[[], T]) -> T | None:
        """The function's result; None, and one problem more, when it raises DATA_INVALID."""
        try:
            return function()
        except FedmeshError as error:
            if error.code is not Code.DATA_INVALID:
                raise
            self.found.append(error)
            return None


def read_dataset(
    source: Source | Path | str,
    manifest: PlanManifest,
    mapping: SourceMapping | None = None,
    partition: PartitionFile | None = None,
    *,
    merge_patients: bool = False,
) -> Dataset:
    """Read a source, or the file at a path, as the plan's features, standardised as the plan says.

    Only the columns that the plan uses, the ids, the label and the exclusions' columns are read. Cells of rows outside
    the cohort are not checked. `merge_patients` allows a patient id in several files: the same id is the same person.

    Raises: FedmeshError(DATA_INVALID): not readable, neither Parquet nor CSV, empty, columns missing (all are named),
        cells that the schema does not allow (column, count and a row number, never a value), an encounter id twice, a
        patient in several files, an outcome that never varies, or the file changed while it was read.
        FedmeshError(CONFIG_INVALID): the mapping is for another schema. Besides, as the source's `load`.
    """
    if isinstance(source, str | Path):
        source = FileSource((Path(source),))
    with open_cohort(source, manifest, mapping, partition) as cohort:
        return dataset_of(cohort, merge_patients=merge_patients)


def dataset_of(cohort: Cohort, *, merge_patients: bool = False) -> Dataset:
    """A cohort's rows as the plan's features, standardised as the plan says. Raises: FedmeshError(DATA_INVALID)."""
    problems = Problems()
    dataset = encode_cohort(cohort, problems, merge_patients)
    if dataset is None:
        raise _first_of(problems)
    return standardised(dataset) if cohort.manifest.standardisation == "local" else dataset


def check_columns(path: Path, manifest: PlanManifest, partition: PartitionFile) -> None:
    """Whether both files have every column that the plan and the partition need; their rows are not looked at.

    Raises: FedmeshError(DATA_INVALID), as `read_dataset`.
    """
    with sandbox([path, partition.path]) as database:
        needed = [mapped.column for mapped in local_columns(manifest, None).values()]
        require_columns(path.name, create_source(database, path, "source"), needed)
        partition_columns(database, partition)


def encode_cohort(cohort: Cohort, problems: Problems, merge_patients: bool) -> Dataset | None:
    """The cohort's numbers, not yet standardised; None when `problems` has some.

    This is the only judge of data: training raises the first problem, `fedmesh hospital check-data` shows them all.
    """
    manifest = cohort.manifest
    schema = manifest.feature_schema
    encounters, patients = cohort.cells(schema.encounter_id), cohort.cells(schema.patient_id)
    problems.attempt(lambda: require_present(encounters))
    problems.attempt(lambda: require_present(patients))
    problems.attempt(lambda: _require_distinct(encounters))
    if not merge_patients:
        problems.attempt(lambda: _require_one_file_each(patients))
    encoded = [
        problems.attempt(lambda column=column: encode(column, cohort.cells(source_column(column))))  # type: ignore[misc]
        for column in manifest.columns
    ]
    groups = problems.attempt(lambda: _groups(cohort))
    label = cohort.cells(schema.label.name)
    y = problems.attempt(lambda: encode_label(schema.label, label))
    if y is not None:
        problems.attempt(lambda: _require_both_outcomes(schema.label.name, y))
    if problems.found or y is None:
        return None
    split = splits_of(cohort, patients)
    return Dataset(
        feature_names=manifest.feature_names,
        x=np.concatenate([part for part in encoded if part is not None], axis=1),
        y=y,
        patient=_dense_within(split, patients.index),
        split=split,
        encounter_ids=_texts(encounters),
        patient_ids=_texts(patients),
        content_sha256=cohort.digest,
        rows_read=cohort.rows_read,
        rows_excluded=cohort.rows_read - cohort.in_cohort,
        rows_elsewhere=cohort.in_cohort - len(split),
        groups=groups,
    )


def _groups(cohort: Cohort) -> NDArray[np.int64] | None:
    """The group of each row in each subgroup column, int64 [n, k]; None without subgroups."""
    manifest = cohort.manifest
    subgroups = () if manifest.checks is None else manifest.checks.subgroups
    found = [
        encode_group(column, subgroup.bands, cohort.cells(source_column(column)))
        for subgroup, column in zip(subgroups, manifest.subgroup_columns, strict=True)
    ]
    return np.stack(found, axis=1) if found else None


def splits_of(cohort: Cohort, patients: Cells) -> NDArray[np.int8]:
    """Which split each row falls on: int8 [n], values of SplitName."""
    if cohort.partitioned:
        splits = cohort.cells("partition_split")
        table = np.array([SPLIT_TEXTS[text or ""] for text in splits.distinct], dtype=np.int8)
        return np.asarray(table[splits.index], dtype=np.int8)
    split = cohort.manifest.feature_schema.split
    table = np.array([_hashed_split(split, text or "") for text in patients.distinct], dtype=np.int8)
    return np.asarray(table[patients.index], dtype=np.int8)


def patients_in_several_parts(patients: Cells) -> NDArray[np.int64]:
    """Positions in `patients.distinct` of the ids that stand in more than one file."""
    pairs = np.unique(np.stack([patients.index, patients.part_numbers]), axis=1)
    positions, parts = np.unique(pairs[0], return_counts=True)
    return np.asarray(positions[parts > 1], dtype=np.int64)


def _first_of(problems: Problems) -> FedmeshError:
    first, more = problems.found[0], len(problems.found) - 1
    if not more:
        return first
    text = f"{first.message} (and {more} more problem{'s' if more > 1 else ''}: fedmesh hospital check-data names all)"
    return FedmeshError(first.code, text, **first.detail)


def _texts(cells: Cells) -> NDArray[np.object_]:
    return np.array(cells.distinct, dtype=np.object_)[cells.index]


def _require_distinct(cells: Cells) -> None:
    present = np.array([text is not None for text in cells.distinct], dtype=bool)[cells.index]
    order = np.flatnonzero(present)
    first_of_each = np.unique(cells.index[order], return_index=True)[1]
    repeats = np.setdiff1d(order, order[first_of_each])
    if len(repeats):
        count = len(repeats)
        raise FedmeshError(
            Code.DATA_INVALID,
            f"column {cells.name!r}: {count} row{'s repeat' if count > 1 else ' repeats'} the encounter id "
            f"of an earlier row; for example {cells.place(int(repeats[0]))}",
            column=cells.name,
            count=count,
            row=int(cells.row_numbers[repeats[0]]),
        )


def _require_one_file_each(patients: Cells) -> None:
    several = patients_in_several_parts(patients)
    if len(several) == 0:
        return
    rows = np.flatnonzero(patients.index == several[0])
    places = {int(patients.part_numbers[row]): patients.place(int(row)) for row in reversed(rows)}
    count = len(several)
    raise FedmeshError(
        Code.DATA_INVALID,
        f"{count} patient id{'s stand' if count > 1 else ' stands'} in more than one file; for example in "
        f"{' and '.join(places[part] for part in sorted(places))}. If the same id is the same person, set "
        "data.patients_across_files to merge, and the person's records count as one patient's; if not, make the ids "
        "differ",
        column=patients.name,
        count=count,
    )


def _require_both_outcomes(name: str, y: NDArray[np.float32]) -> None:
    if len(y) >= ROWS_WITH_BOTH_OUTCOMES and np.ptp(y) == 0:
        raise FedmeshError(
            Code.DATA_INVALID,
            f"column {name!r}: the outcome is {'positive' if y[0] else 'negative'} in every row, from which nothing "
            "can be learnt; look at what the column means here, at data.mapping, and at how long patients were "
            "followed up",
            column=name,
        )


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
