"""What a hospital's data looks like to a plan: counted here, for the hospital's own eyes."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.common.errors import FedmeshError
from services.hospital_node.sources.cohort import Cohort, Source, open_cohort
from services.hospital_node.sources.dataset import SplitName, require_training_rows
from services.hospital_node.sources.encoder import CellProblem, Cells, coordinates, level_of, number_of
from services.hospital_node.sources.mapping import PartitionFile, SourceMapping
from services.hospital_node.sources.reader import Problems, encode_cohort, patients_in_several_parts, splits_of
from services.plans.manifest import PlanManifest
from services.plans.schema import (
    MISSING,
    NUMERIC_BINS,
    OTHERS,
    Categorical,
    Column,
    Flag,
    Label,
    Numeric,
    bin_names,
    numeric_edges,
    source_column,
)


@dataclass(frozen=True)
class ColumnFacts:
    """One feature of the plan, in rows of the cohort.

    missing: cells that are empty or stand for missing; unusable: cells that make the plan refuse the data;
    out_of_range: numbers that training moves to the schema's minimum or maximum; unknown: texts of no level and the
    rows that have them, which training puts into the others; bins: rows in each of `bin_names`; constant: every row has
    the same coordinates.
    """

    name: str
    column: str
    missing: int
    unusable: int
    out_of_range: int
    unknown: dict[str, int]
    bins: dict[str, int]
    constant: bool


@dataclass(frozen=True)
class SplitFacts:
    rows: int
    patients: int
    positive: int


@dataclass(frozen=True)
class CohortFacts:
    """The cohort as a whole. repeated: patients that stand in several files; most_rows: of one patient."""

    rows_read: int
    rows_excluded: int
    rows_elsewhere: int
    rows: int
    patients: int
    repeated: int
    most_rows: int
    positive: int
    outcomes: dict[str, int]
    splits: dict[str, SplitFacts]
    columns: tuple[ColumnFacts, ...]


@dataclass
class Inspection:
    """`problems`: why training would refuse the data, every one of them; `facts`: None when it cannot even be read."""

    source: str
    problems: list[FedmeshError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: CohortFacts | None = None


def inspect(
    source: Source,
    manifest: PlanManifest,
    mapping: SourceMapping | None,
    partition: PartitionFile | None,
    *,
    merge_patients: bool,
) -> Inspection:
    """Read the source as training does, with the same checks, and count.

    Raises: FedmeshError of any code but DATA_INVALID, as `read_dataset`.
    """
    problems = Problems()
    result = Inspection(source.name, problems.found)

    def look() -> None:
        with open_cohort(source, manifest, mapping, partition) as cohort:
            dataset = encode_cohort(cohort, problems, merge_patients)
            result.notes += cohort.notes
            result.facts = _cohort_facts(cohort)
        if dataset is not None:
            require_training_rows(int((dataset.split == SplitName.TRAIN).sum()))

    problems.attempt(look)
    if result.facts is not None:
        result.notes += _warnings(result.facts)
    return result


def _cohort_facts(cohort: Cohort) -> CohortFacts:
    manifest = cohort.manifest
    schema = manifest.feature_schema
    patients, label = cohort.cells(schema.patient_id), cohort.cells(schema.label.name)
    positive = np.array([text in schema.label.positive for text in label.distinct], dtype=bool)[label.index]
    split = splits_of(cohort, patients)
    outcomes = _counts(label, lambda text: _label_bin(schema.label, text))
    return CohortFacts(
        rows_read=cohort.rows_read,
        rows_excluded=cohort.rows_read - cohort.in_cohort,
        rows_elsewhere=cohort.in_cohort - len(split),
        rows=len(split),
        patients=len(patients.distinct),
        repeated=len(patients_in_several_parts(patients)),
        most_rows=int(np.bincount(patients.index).max()) if len(patients.index) else 0,
        positive=int(positive.sum()),
        outcomes=outcomes,
        splits={side.name.lower(): _split_facts(split == side, patients, positive) for side in SplitName},
        columns=tuple(_column_facts(column, cohort.cells(source_column(column))) for column in manifest.columns),
    )


def _split_facts(mask: NDArray[np.bool_], patients: Cells, positive: NDArray[np.bool_]) -> SplitFacts:
    return SplitFacts(int(mask.sum()), len(np.unique(patients.index[mask])), int(positive[mask].sum()))


def _column_facts(column: Column, cells: Cells) -> ColumnFacts:
    rows = np.bincount(cells.index, minlength=len(cells.distinct)).tolist()
    missing = unusable = out_of_range = 0
    unknown: dict[str, int] = {}
    found = set()
    for text, count in zip(cells.distinct, rows, strict=True):
        missing += count if text is None else 0
        try:
            found.add(coordinates(column, text))
        except CellProblem:
            unusable += count
            if text is not None and (not isinstance(column, Numeric) or column.values):
                unknown[text] = count
            continue
        if isinstance(column, Numeric) and not column.minimum <= number_of(column, text) <= column.maximum:
            out_of_range += count
        if isinstance(column, Categorical) and text is not None and level_of(column, text) is None:
            unknown[text] = count
    bins = _counts(cells, lambda text: _bin(column, text))
    ordered = {name: bins.get(name, 0) for name in bin_names(column)}
    constant = len(found) == 1 and not unusable
    return ColumnFacts(column.name, cells.name, missing, unusable, out_of_range, unknown, ordered, constant)


def _counts(cells: Cells, bin_of: Callable[[str | None], str | None]) -> dict[str, int]:
    """Rows by the bin of their cell; cells of no bin are left out."""
    counted: Counter[str] = Counter()
    for text, count in zip(cells.distinct, np.bincount(cells.index).tolist(), strict=True):
        name = bin_of(text)
        if name is not None:
            counted[name] += count
    return dict(counted)


def _bin(column: Column, text: str | None) -> str | None:
    if text is None:
        return MISSING
    if isinstance(column, Categorical):
        return level_of(column, text) or OTHERS
    if isinstance(column, Flag):
        return "true" if text in column.true else "false" if text in column.false else None
    if column.values:
        return text if text in column.values else None
    try:
        value = min(max(number_of(column, text), column.minimum), column.maximum)
    except CellProblem:
        return None
    position = bisect_right(numeric_edges(column), value + 1e-9 * max(1.0, math.fabs(value))) - 1
    return bin_names(column)[min(position, NUMERIC_BINS - 1)]


def _label_bin(label: Label, text: str | None) -> str | None:
    return "positive" if text in label.positive else "negative" if text in label.negative else None


def _warnings(facts: CohortFacts) -> list[str]:
    """What does not stop training, but is seldom meant."""
    found = []
    for name, side in facts.splits.items():
        if side.rows and side.positive in (0, side.rows):
            found.append(f"in the split {name} every outcome is the same")
        if not side.rows:
            found.append(f"the split {name} has no rows")
    constant = [column.name for column in facts.columns if column.constant]
    if constant and facts.rows > 1:
        found.append(f"the same in every row, so nothing is learnt from them: {', '.join(constant)}")
    return found
