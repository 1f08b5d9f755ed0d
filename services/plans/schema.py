"""The public feature schema: how local rows become the numbers that a model sees.

Everything here is written in advance from public knowledge (documentation, published statistics, the source's code
book). Centres, scales and level lists never come from the hospitals' data: statistics of the data would be a release
that nobody accounted for.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from services.plans.document import Strict

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]
CellText = Annotated[str, Field(max_length=120)]
Finite = Annotated[float, Field(ge=-1e9, le=1e9)]
PositiveScale = Annotated[float, Field(ge=1e-6, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
NUMERIC_BINS: Final = 10
MISSING: Final = "missing"
OTHERS: Final = "others"


class Numeric(Strict):
    """One coordinate: (transform(clamp(value, minimum, maximum)) - centre) / scale."""

    kind: Literal["numeric"]
    name: Identifier
    # The source column that is read; null: the one called `name`.
    column: Identifier | None = None
    minimum: Finite
    maximum: Finite
    transform: Literal["identity", "log1p"] = "identity"
    centre: Finite = 0.0
    scale: PositiveScale = 1.0
    # Number that a text stands for, such as an age band's middle. Empty: the text itself must be a number.
    values: dict[CellText, Finite] = Field(default_factory=dict)
    # Number used for a missing cell. Null: a missing cell is an error.
    missing: Finite | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require(self.minimum < self.maximum, f"minimum {self.minimum} must be below maximum {self.maximum}")
        return self.require(
            self.transform == "identity" or self.minimum >= 0, "transform log1p needs a minimum of 0 or more"
        )

    @property
    def features(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Largest absolute value of each coordinate."""
        ends = (self.minimum, self.maximum)
        if self.transform == "log1p":
            ends = (math.log1p(self.minimum), math.log1p(self.maximum))
        return (max(abs(end - self.centre) for end in ends) / self.scale,)


class Level(Strict):
    """A named group of cell values: exact texts, or half-open ranges [low, high) of their number.

    Its indicator's coordinate is (1 or 0, less centre) / scale.
    """

    name: Identifier
    values: tuple[CellText, ...] = ()
    ranges: tuple[tuple[Finite, Finite], ...] = ()
    centre: Annotated[float, Field(ge=0, le=1)] = 0.0
    scale: PositiveScale = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require(bool(self.values or self.ranges), f"level {self.name!r} has neither values nor ranges")
        return self.require(
            all(low < high for low, high in self.ranges), f"level {self.name!r}: a range is [low, high)"
        )


class Categorical(Strict):
    """One indicator for each level that is not the reference; the first level that matches a cell wins.

    A cell that matches no level, or is missing, falls in the others bucket, which has an indicator (`indicator`), has
    none (`reference`), or is an error (`refuse`).
    """

    kind: Literal["categorical"]
    name: Identifier
    # The source column that is read; null: the one called `name`.
    column: Identifier | None = None
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=200)]
    reference: Identifier | None = None
    others: Literal["indicator", "reference", "refuse"] = "reference"

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [level.name for level in self.levels]
        self.require(len(set(names)) == len(names), f"column {self.name!r}: a level name appears twice")
        self.require("others" not in names, f"column {self.name!r}: the level name 'others' is reserved")
        texts = [text for level in self.levels for text in level.values]
        self.require(len(set(texts)) == len(texts), f"column {self.name!r}: a value belongs to two levels")
        return self.require(
            self.reference is None or self.reference in names,
            f"column {self.name!r}: reference {self.reference!r} is not one of its levels {', '.join(names)}",
        )

    @property
    def features(self) -> tuple[str, ...]:
        names = [f"{self.name}={level.name}" for level in self.indicated]
        return (*names, f"{self.name}=others") if self.others == "indicator" else tuple(names)

    @property
    def indicated(self) -> tuple[Level, ...]:
        """The levels that have an indicator."""
        return tuple(level for level in self.levels if level.name != self.reference)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Largest absolute value of each coordinate."""
        bounds = tuple(max(level.centre, 1.0 - level.centre) / level.scale for level in self.indicated)
        return (*bounds, 1.0) if self.others == "indicator" else bounds


class Flag(Strict):
    """One coordinate: (1 or 0, less centre) / scale. Any other cell is an error unless `missing` says its value."""

    kind: Literal["flag"]
    name: Identifier
    # The source column that is read; null: the one called `name`.
    column: Identifier | None = None
    true: Annotated[tuple[CellText, ...], Field(min_length=1)]
    false: Annotated[tuple[CellText, ...], Field(min_length=1)]
    missing: Annotated[float, Field(ge=0, le=1)] | None = None
    centre: Annotated[float, Field(ge=0, le=1)] = 0.0
    scale: PositiveScale = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.true) & set(self.false)
        return self.require(not both, f"column {self.name!r}: {sorted(both)} stand for both true and false")

    @property
    def features(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Largest absolute value of each coordinate."""
        return (max(self.centre, 1.0 - self.centre) / self.scale,)


def source_column(column: "Column") -> str:
    """The schema's name for the cells that a column reads."""
    return column.column or column.name


Column = Annotated[Numeric | Categorical | Flag, Field(discriminator="kind")]


class Label(Strict):
    """The outcome: 1 for `positive` cells, 0 for `negative` cells; any other cell is an error."""

    name: Identifier
    positive: Annotated[tuple[CellText, ...], Field(min_length=1)]
    negative: Annotated[tuple[CellText, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.positive) & set(self.negative)
        return self.require(not both, f"{sorted(both)} are both positive and negative")


class Exclusion(Strict):
    """Rows whose `name` cell is one of `values` are not part of the cohort."""

    name: Identifier
    values: Annotated[tuple[CellText, ...], Field(min_length=1, max_length=1000)]


class Split(Strict):
    """Which patients train, validate and test: by a salted SHA-256 of the patient id, so every record of a patient
    falls on one side and nothing has to be stored. The fractions must add up to 1."""

    train: Annotated[float, Field(gt=0, le=1)]
    validation: Annotated[float, Field(ge=0, lt=1)]
    test: Annotated[float, Field(ge=0, lt=1)]
    salt: Annotated[str, Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = self.train + self.validation + self.test
        return self.require(abs(total - 1) < 1e-9, f"train + validation + test must be 1, not {total:g}")


def numeric_edges(column: Numeric) -> list[float]:
    """Edges of NUMERIC_BINS bins, equally wide after the column's transform, from minimum to maximum."""
    low, high = column.minimum, column.maximum
    if column.transform == "log1p":
        low, high = math.log1p(low), math.log1p(high)
    edges = [low + (high - low) * step / NUMERIC_BINS for step in range(NUMERIC_BINS + 1)]
    return [math.expm1(edge) for edge in edges] if column.transform == "log1p" else edges


def bin_names(column: "Column | Label") -> tuple[str, ...]:
    """The bins in which a column's cells are counted when populations are compared: public, whatever the data."""
    if isinstance(column, Label):
        return ("positive", "negative")
    if isinstance(column, Flag):
        return ("true", "false", MISSING)
    if isinstance(column, Categorical):
        return (*(level.name for level in column.levels), OTHERS, MISSING)
    if column.values:
        return (*column.values, MISSING)
    edges = numeric_edges(column)
    return (*(f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)), MISSING)


class FeatureSchema(Strict):
    """The public schema of one kind of data set; a hospital maps its own column names to the names used here."""

    name: Identifier
    description: Annotated[str, Field(max_length=2000)] = ""
    patient_id: Identifier
    encounter_id: Identifier
    label: Label
    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=2000)]
    exclude: tuple[Exclusion, ...] = ()
    # Cell texts that mean "missing", besides an empty cell.
    missing_values: tuple[CellText, ...] = ()
    split: Split
    # Shares of columns' bins (`bin_names`) in a published population, by the column's or the label's name:
    # what a hospital's data is compared with, by the hospital alone. Training does not look at them.
    reference: dict[Identifier, dict[CellText, Share]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _serialise(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A schema that declares none has the bytes, and a plan the id, that it had before the field existed.
        document: dict[str, Any] = handler(self)
        if not self.reference:
            document.pop("reference", None)
        return document

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        columns: dict[str, Column | Label] = {column.name: column for column in self.columns}
        columns[self.label.name] = self.label
        for name, shares in self.reference.items():
            self.require(name in columns, f"reference: the schema has no column {name!r}")
            unknown = sorted(set(shares) - set(bin_names(columns[name])))
            self.require(
                not unknown,
                f"reference of {name!r}: {', '.join(unknown)} is no bin; "
                f"there are: {', '.join(bin_names(columns[name]))}",
            )
            total = sum(shares.values())
            self.require(abs(total - 1) <= 0.02, f"reference of {name!r}: the shares add up to {total:g}, not 1")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [column.name for column in self.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        self.require(not twice, f"columns: {', '.join(twice)} appear twice")
        reserved = {self.patient_id, self.encounter_id, self.label.name}
        self.require(len(reserved) == 3, "patient_id, encounter_id and label must be three different columns")
        used = sorted(reserved & set(names))
        return self.require(
            not used, f"columns: {', '.join(used)} cannot be a feature and also the patient id, encounter id or label"
        )
