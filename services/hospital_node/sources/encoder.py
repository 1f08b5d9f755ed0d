"""Cells to numbers, by the public schema's rules.

Everything works on the distinct texts of a column: each is encoded, or found wrong, once. Messages name the column, how
many rows are wrong and the number of one such row; they never repeat a cell, which belongs to a patient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.plans.schema import Categorical, Column, Flag, Label, Level, Numeric


@dataclass(frozen=True)
class Cells:
    """One column of the cohort: its distinct texts (None for a missing cell), and for each row which one it has.

    distinct: [k]; index: int64 [n] into `distinct`; row_numbers: int64 [n], 1-based data row of the file, and
    part_numbers: int64 [n], which of `parts`, the files' names, it is.
    """

    name: str
    distinct: tuple[str | None, ...]
    index: NDArray[np.int64]
    row_numbers: NDArray[np.int64]
    part_numbers: NDArray[np.int64]
    parts: tuple[str, ...]

    def place(self, row: int) -> str:
        """Where row `row`, from 0, stands in the source."""
        text = f"data row {int(self.row_numbers[row])}"
        return text if len(self.parts) == 1 else f"{text} of {self.parts[int(self.part_numbers[row])]}"


class CellProblem(Exception):
    """A cell that the schema does not allow; the text says what is allowed."""


def encode(column: Column, cells: Cells) -> NDArray[np.float32]:
    """The column's coordinates: float32 [n, len(column.features)].

    Raises: FedmeshError(DATA_INVALID).
    """
    return _encode_distinct(cells, lambda text: coordinates(column, text), len(column.features))


def coordinates(column: Column, text: str | None) -> tuple[float, ...]:
    """The coordinates of one cell. Raises: CellProblem."""
    if isinstance(column, Numeric):
        return _numeric(column, text)
    return _flag(column, text) if isinstance(column, Flag) else _categorical(column, text)


def encode_group(column: Column, bands: Sequence[float], cells: Cells) -> NDArray[np.int64]:
    """The group of each row, numbered as in `services.plans.checks.Subgroup.groups`: int64 [n].

    Raises: FedmeshError(DATA_INVALID).
    """

    def encoder(text: str | None) -> tuple[float, ...]:
        if isinstance(column, Numeric):
            return (float(np.searchsorted(bands, number_of(column, text), side="right")),)
        if isinstance(column, Flag):
            (value,) = _flag(column.model_copy(update={"centre": 0.0, "scale": 1.0}), text)
            return (float(value >= 0.5),)
        known, name = [level.name for level in column.levels], level_of(column, text)
        return (float(len(known) if name is None else known.index(name)),)

    return _encode_distinct(cells, encoder, 1)[:, 0].astype(np.int64)


def encode_label(label: Label, cells: Cells) -> NDArray[np.float32]:
    """The outcome: float32 [n], 0 or 1.

    Raises: FedmeshError(DATA_INVALID).
    """
    meaning = {**dict.fromkeys(label.positive, 1.0), **dict.fromkeys(label.negative, 0.0)}

    def encoder(text: str | None) -> tuple[float, ...]:
        if text not in meaning:
            raise CellProblem(f"is none of the outcomes {_listed(meaning)}")
        return (meaning[text],)

    return _encode_distinct(cells, encoder, 1)[:, 0]


def require_present(cells: Cells) -> None:
    """Ids must not be missing.

    Raises: FedmeshError(DATA_INVALID).
    """

    def encoder(text: str | None) -> tuple[float, ...]:
        if not text:
            raise CellProblem("is missing, and an id is required")
        return ()

    # Almost every row has an id of its own: they are looked at one by one only to say which one is wrong.
    if not all(cells.distinct):
        _encode_distinct(cells, encoder, 0)


def _encode_distinct(
    cells: Cells, encoder: Callable[[str | None], tuple[float, ...]], width: int
) -> NDArray[np.float32]:
    table = np.zeros((len(cells.distinct), width), dtype=np.float32)
    problems: dict[int, str] = {}
    for position, text in enumerate(cells.distinct):
        try:
            table[position] = encoder(text)
        except CellProblem as problem:
            problems[position] = str(problem)
    if problems:
        wrong = np.isin(cells.index, list(problems))
        first = int(np.argmax(wrong))
        count, row = int(wrong.sum()), int(cells.row_numbers[first])
        raise FedmeshError(
            Code.DATA_INVALID,
            f"column {cells.name!r}: {count} cell{'s' if count > 1 else ''} cannot be used; for example the cell in "
            f"{cells.place(first)} {problems[int(cells.index[first])]}",
            column=cells.name,
            count=count,
            row=row,
        )
    return table[cells.index]


def number_of(column: Numeric, text: str | None) -> float:
    """The number that a cell stands for, before it is clamped to the schema's range. Raises: CellProblem."""
    if text is None:
        if column.missing is None:
            raise CellProblem("is missing, and the schema has no value for a missing cell")
        return column.missing
    if column.values:
        if text not in column.values:
            raise CellProblem(f"is none of the values {_listed(column.values)}")
        return column.values[text]
    number = _number(text)
    if number is None:
        raise CellProblem(_why_no_number(text))
    return number


def level_of(column: Categorical, text: str | None) -> str | None:
    """The name of the level that a cell belongs to, None for none of them."""
    return next((level.name for level in column.levels if text is not None and _matches(level, text)), None)


def _numeric(column: Numeric, text: str | None) -> tuple[float, ...]:
    value = min(max(number_of(column, text), column.minimum), column.maximum)
    if column.transform == "log1p":
        value = math.log1p(value)
    return ((value - column.centre) / column.scale,)


def _value(column: Numeric, text: str | None) -> float:
    """The number of a cell, in the column's own units. Raises: CellProblem."""
    if text is None:
        if column.missing is None:
            raise CellProblem("is missing, and the schema has no value for a missing cell")
        return column.missing
    if column.values:
        if text not in column.values:
            raise CellProblem(f"is none of the values {_listed(column.values)}")
        return column.values[text]
    number = _number(text)
    if number is None:
        raise CellProblem("is not a number")
    return number


def _flag(column: Flag, text: str | None) -> tuple[float, ...]:
    if text is None:
        if column.missing is None:
            raise CellProblem("is missing, and the schema has no value for a missing cell")
        value = column.missing
    elif text in column.true or text in column.false:
        value = 1.0 if text in column.true else 0.0
    else:
        raise CellProblem(f"is none of the values {_listed((*column.true, *column.false))}")
    return ((value - column.centre) / column.scale,)


def _categorical(column: Categorical, text: str | None) -> tuple[float, ...]:
    level = level_of(column, text)
    if level is None:
        if column.others == "refuse":
            what = "is missing" if text is None else "belongs to none of the levels"
            raise CellProblem(f"{what}: {_listed(level.name for level in column.levels)}")
        level = "others"
    indicators = [(float(item.name == level) - item.centre) / item.scale for item in column.indicated]
    if column.others == "indicator":
        indicators.append(float(level == "others"))
    return tuple(indicators)


def _matches(level: Level, text: str) -> bool:
    if text in level.values:
        return True
    number = _number(text) if level.ranges else None
    return number is not None and any(low <= number < high for low, high in level.ranges)


def _number(text: str) -> float | None:
    """Plain decimal numbers only: Python's float() would also take 'nan', 'inf', '1_000' and Arabic digits."""
    if not text.isascii() or "_" in text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _why_no_number(text: str) -> str:
    try:
        infinite = not math.isfinite(float(text))
    except ValueError:
        infinite = False
    if infinite:
        return (
            "is not a finite number (NaN or infinity): leave a missing cell empty, and correct the others at the source"
        )
    return "is not a number"


def _listed(values: object) -> str:
    texts = [repr(value) for value in list(values)[:12]]  # type: ignore[call-overload]
    return ", ".join(texts)
