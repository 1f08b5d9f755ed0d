"""UCI Heart Disease: four real hospitals, prepared and split as in the FLamby benchmark (Ogier du Terrail et al. 2022).

The files are headerless CSV, one a hospital. Of the records without a missing value 34 % are a hospital's test set, by
one fixed draw. Of the rest a fifth is held out for validation, by the seed of the run.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from services.common.errors import Code, FedmeshError
from services.demo.storage import storing, write_text
from services.demo.synthetic import CohortFiles

HOSPITALS: Final = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS: Final = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"),
    *("slope", "ca", "thal", "num"),
)
# The last attributes are mostly missing outside Cleveland; the benchmark drops them.
_USED: Final = tuple(name for name in COLUMNS if name not in ("slope", "ca", "thal"))
_TRAIN: Final = 0.66
_SPLIT_SEED: Final = 43
_VALIDATION: Final = 0.2
# Fewer of an outcome cannot be spread over both sides.
_LEAST_STRATUM: Final = 3


@dataclass(frozen=True)
class _Record:
    """hospital, running number in its file (from 1), cells in the order of COLUMNS."""

    hospital: str
    number: int
    cells: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.hospital}-{self.number:03d}"

    @property
    def complete(self) -> bool:
        return all(cell != "?" for name, cell in zip(COLUMNS, self.cells, strict=True) if name in _USED)

    @property
    def ill(self) -> bool:
        return self.cells[-1] != "0"


def is_heart(folder: Path) -> bool:
    """Whether a folder has at least one of the files."""
    return any(_file(folder, hospital).is_file() for hospital in HOSPITALS)


def prepare(source: Path, folder: Path, seed: int) -> CohortFiles:
    """Write the records of all hospitals as one table with ids and a header, and the partition beside it.

    Raises: FedmeshError: DATA_INVALID naming the file, and the line that is wrong; as `storing`.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines: list[Sequence[str]] = [("record", "visit", *COLUMNS)]
    assigned: list[Sequence[str]] = [("patient_nbr", "hospital", "split")]
    for hospital in HOSPITALS:
        records = _read(_file(source, hospital), hospital)
        lines += [(record.id, record.id, *record.cells) for record in records]
        complete = [record for record in records if record.complete]
        if len(complete) < 2 * _LEAST_STRATUM:
            raise FedmeshError(
                Code.DATA_INVALID,
                f"{_file(source, hospital).name} has {len(complete)} complete records, too few to be split",
            )
        for record, split in zip(complete, splits([record.ill for record in complete], seed), strict=True):
            assigned.append((record.id, hospital, split))
    files = CohortFiles(folder / "heart.csv", folder / "partition.csv")
    write_text(files.encounters, _as_csv(lines))
    write_text(files.partition, _as_csv(assigned))
    return files


def _as_csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def splits(ill: Sequence[bool], seed: int) -> list[str]:
    """`train`, `val` or `test` for each complete record of a hospital; the test set does not depend on the seed."""
    outcome = np.array(ill)
    rest, test = train_test_split(
        np.arange(len(outcome)),
        train_size=_TRAIN,
        test_size=1.0 - _TRAIN,
        random_state=_SPLIT_SEED,
        stratify=_strata(outcome),
    )
    _, validation = train_test_split(rest, test_size=_VALIDATION, random_state=seed, stratify=_strata(outcome[rest]))
    names = np.full(len(outcome), "train", dtype=object)
    names[test], names[validation] = "test", "val"
    return [str(name) for name in names]


def _strata(outcome: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    counts = np.bincount(outcome.astype(int), minlength=2)
    return outcome if counts.min() >= _LEAST_STRATUM else None


def file_name(hospital: str) -> str:
    """The name of a hospital's file."""
    return f"processed.{hospital}.data"


def _file(folder: Path, hospital: str) -> Path:
    return folder / file_name(hospital)


def _read(path: Path, hospital: str) -> list[_Record]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError as error:
        raise FedmeshError(
            Code.DATA_INVALID, f"{path.parent} lacks {path.name}: UCI Heart Disease is one file for each of 4 hospitals"
        ) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path.name}: it is no readable CSV file") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != len(COLUMNS):
            raise FedmeshError(
                Code.DATA_INVALID, f"{path.name}: record {number} has {len(row)} values, expected {len(COLUMNS)}"
            )
    return [_Record(hospital, number, tuple(cell.strip() for cell in row)) for number, row in enumerate(rows, start=1)]
