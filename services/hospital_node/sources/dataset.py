"""A validated local data set, in the coordinates of a plan's features."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError


class SplitName(IntEnum):
    """Which side of the split a row falls on; the values are those of `Dataset.split`."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the order of the source.

    x: float32 [n, d]; y: float32 [n], 0 or 1; patient: int64 [n], dense from 0 to patients - 1; encounter_ids and
    patient_ids: text [n], as in the source; groups: int64 [n, k], the group of each row in each of the plan's subgroup
    columns, None where it has none. The ids never leave the hospital.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    patient: NDArray[np.int64]
    patients: int
    encounter_ids: NDArray[np.object_]
    patient_ids: NDArray[np.object_]
    groups: NDArray[np.int64] | None = None


def require_training_rows(rows: int) -> None:
    """Raises: FedmeshError(DATA_INVALID) when no row is left to train on."""
    if rows == 0:
        raise FedmeshError(Code.DATA_INVALID, "the data set has no training rows")


@dataclass(frozen=True)
class Dataset:
    """One snapshot of a source.

    x: float32 [n, d] in the order of `feature_names`; y: float32 [n], 0 or 1; split: int8 [n], values of SplitName;
    patient: int64 [n], dense within each split; `content_sha256` is the SHA-256 of the file's bytes in hex.
    `rows_read` counts the file's rows, `rows_excluded` those outside the cohort by the schema's exclusions,
    `groups` as in Rows; `rows_elsewhere` those of patients that a partition file gives to others.
    """

    feature_names: tuple[str, ...]
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    patient: NDArray[np.int64]
    split: NDArray[np.int8]
    encounter_ids: NDArray[np.object_]
    patient_ids: NDArray[np.object_]
    content_sha256: str
    rows_read: int
    rows_excluded: int
    rows_elsewhere: int
    groups: NDArray[np.int64] | None = None

    def rows(self, split: SplitName) -> Rows:
        """The rows of one split."""
        mask = self.split == split
        patient = self.patient[mask]
        return Rows(
            x=self.x[mask],
            y=self.y[mask],
            patient=patient,
            patients=int(patient.max()) + 1 if len(patient) else 0,
            encounter_ids=self.encounter_ids[mask],
            patient_ids=self.patient_ids[mask],
            groups=None if self.groups is None else self.groups[mask],
        )
