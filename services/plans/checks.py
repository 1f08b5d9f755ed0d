"""What a plan demands of its model before anybody may promote it."""

from itertools import pairwise
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from services.plans.document import Strict
from services.plans.schema import Column, Flag, Identifier, Numeric

MAX_GROUPS: Final = 64


class Subgroup(Strict):
    """Patients told apart by one of the schema's columns, which need not be a feature: by level or flag, or a numeric
    column by bands. `bands` are the inner edges in the column's own units; a value on an edge is in the upper band.
    """

    column: Identifier
    bands: Annotated[tuple[float, ...], Field(max_length=15)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        return self.require(all(low < high for low, high in pairwise(self.bands)), "bands must ascend")

    def groups(self, column: Column) -> tuple[str, ...]:
        """Names of the groups, each encounter in one: the levels and `others`, `true` and `false`, or the bands."""
        if isinstance(column, Numeric):
            edges = [f"{edge:g}" for edge in self.bands]
            return (f"below-{edges[0]}", *(f"{low}-to-{high}" for low, high in pairwise(edges)), f"from-{edges[-1]}")
        if isinstance(column, Flag):
            return ("false", "true")
        return (*(level.name for level in column.levels), "others")

    def misfit(self, column: Column) -> str:
        """Why this column cannot tell groups apart so; empty when it can."""
        if isinstance(column, Numeric) == bool(self.bands):
            return ""
        return f"{self.column} needs bands" if isinstance(column, Numeric) else f"{self.column} takes no bands"


class Checks(Strict):
    """Bounds for promotion, and what is measured for them.

    The last round measures and does not train: its contribution has, in place of a gradient, a histogram of the score
    on the training patients (as many releases of their data as without checks, under the same noise), and on the
    validation patients one more for each subgroup. So version `rounds.count` has the state of the version before, and
    what is measured is of this very state.
    """

    # AUROC on validation rows that the last measurement must reach.
    least_auroc: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    # A measurement this much below the best one before ends the job, with the best one's version as its result.
    largest_auroc_drop: Annotated[float, Field(gt=0, le=1.0)] = 0.05
    # AUC of the membership-inference attack; 0.5 is guessing.
    largest_attack_auc: Annotated[float, Field(ge=0.5, le=1.0)] = 0.6
    # How far a group's AUROC may lie below that of all.
    largest_subgroup_gap: Annotated[float, Field(gt=0, le=1.0)] = 0.1
    # Positives, and negatives, that a group must have (as measured, with noise) to be judged.
    least_subgroup_count: Annotated[int, Field(ge=1, le=10**6)] = 100
    subgroups: Annotated[tuple[Subgroup, ...], Field(max_length=8)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [group.column for group in self.subgroups]
        return self.require(len(set(names)) == len(names), "subgroups: a column appears twice")


def group_names(checks: Checks, columns: dict[str, Column]) -> tuple[tuple[str, str], ...]:
    """(column, group) of every subgroup, in the order of the measuring round's coordinates."""
    return tuple((one.column, group) for one in checks.subgroups for group in one.groups(columns[one.column]))
