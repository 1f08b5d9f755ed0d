"""Where the demonstration's data comes from: made here, read from a folder, or fetched from OpenML.

`heart` prepares what is read from a folder with UCI Heart Disease.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from services.common.errors import Code, FedmeshError
from services.demo import heart, openml
from services.demo.storage import storing, write_table, write_text
from services.demo.synthetic import SIZES, CohortFiles, generate
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import check_columns, read_dataset
from services.plans.manifest import PlanManifest

SYNTHETIC: Final = "synthetic"
DIABETES130: Final = "diabetes130"
HEART: Final = "heart"
_OPENML_ID: Final = 4541
# Beside the files of a cohort that a demonstration wrote: which one it is.
_MARK: Final = "source.txt"


@dataclass(frozen=True)
class DemoData:
    """A cohort to train on. `hospitals`: the partition's values, in order."""

    name: str
    encounters: Path
    partition: Path
    hospitals: tuple[str, ...]
    synthetic: bool

    @property
    def description(self) -> str:
        if self.synthetic:
            return "SYNTHETIC cohort (nobody in it exists)"
        if self.name == HEART:
            return "UCI Heart Disease: real patients of real hospitals, which referred them for angiography"
        return f"{self.name}: real encounters, hospitals assigned by a synthetic partition"

    @property
    def judged_by_accuracy(self) -> bool:
        """Whether the share of right answers says anything: not where one outcome is rare."""
        return self.name == HEART

    @property
    def seeded(self) -> str:
        """What the seed of a run decides in the data; empty when it decides nothing."""
        return "which training records are held out for validation" if self.name == HEART else ""


def synthetic(folder: Path, hospitals: int) -> DemoData:
    """Make the synthetic cohort of 4 to 15 hospitals in a folder.

    Raises: FedmeshError(STORE_FULL, CONFIG_INVALID) when the folder is full or cannot be written.
    """
    _mark(folder, SYNTHETIC)
    files = generate(folder, SIZES[:hospitals])
    return _described(SYNTHETIC, files)


def from_folder(folder: Path, plan: PlanManifest) -> DemoData:
    """Use diabetes-130 files: `diabetic_data.parquet` or `.csv`, and a partition CSV (patient_nbr,hospital,split).

    A cohort that an earlier demonstration made there is named as what it is; files without such a mark are real.

    Raises: FedmeshError(DATA_INVALID) naming the file or the columns that the plan misses.
    """
    encounters = _first(
        folder,
        ("diabetic_data.parquet", "diabetic_data.csv"),
        "the encounters",
        f" (or {heart.file_name(heart.HOSPITALS[0])} and the others of UCI Heart Disease)",
    )
    partition = _first(folder, ("partition15.csv", "partition.csv"), "the partition (patient_nbr,hospital,split)")
    name = _marked(folder) or DIABETES130
    # Here, where the person waits, and not at the hospitals: those would only decline the job.
    check_columns(encounters, plan, PartitionFile(partition, hospital=""))
    return _described(name, CohortFiles(encounters, partition))


def heart_hospitals(source: Path, folder: Path, plan: PlanManifest, seed: int) -> DemoData:
    """Prepare UCI Heart Disease from its four files in a folder of the demonstration's own.

    seed: decides which training records are held out for validation, and nothing else.

    Raises: FedmeshError: as `heart.prepare`, and as `read_dataset` for cells that the schema does not allow.
    """
    described = _described(HEART, heart.prepare(source, folder, seed))
    for hospital in described.hospitals:
        read_dataset(described.encounters, plan, partition=PartitionFile(described.partition, hospital))
    return described


def fetch_openml(
    folder: Path, plan: PlanManifest, say: Callable[[str], None], address: str = openml.ADDRESS
) -> DemoData:
    """Fetch diabetes-130 from OpenML, and assign its patients to fifteen hospitals by a hash of their number.

    What an earlier call fetched into the folder is used again.

    Raises: FedmeshError: as `openml.fetch`; DATA_INVALID when columns are missing.
    """
    files = CohortFiles(folder / "diabetic_data.parquet", folder / "partition15.csv")
    # The partition is written last.
    if not (_marked(folder) == DIABETES130 and files.encounters.exists() and files.partition.exists()):
        _mark(folder, DIABETES130)
        say(f"Fetching diabetes-130 from OpenML (data set {_OPENML_ID}, about 20 MB) ...")
        columns = openml.fetch(_OPENML_ID, folder / ".openml.arff", address)
        missing = {"encounter_id", "patient_nbr", "readmitted"} - set(columns)
        if missing:
            raise FedmeshError(Code.DATA_INVALID, f"OpenML's data set {_OPENML_ID} lacks {', '.join(sorted(missing))}")
        _save(columns, files)
    check_columns(files.encounters, plan, PartitionFile(files.partition, hospital=""))
    return _described(DIABETES130, files)


def _save(columns: Mapping[str, Sequence[str]], files: CohortFiles) -> None:
    weights = np.array(SIZES) / sum(SIZES)
    cuts = np.cumsum(weights)
    lines = ["patient_nbr,hospital,split"]
    for patient in sorted(set(columns["patient_nbr"])):
        draw = hashlib.sha256(f"fedmesh-partition/{patient}".encode()).digest()
        hospital = int(np.searchsorted(cuts, int.from_bytes(draw[:6], "big") / 2**48, side="right"))
        share = int.from_bytes(draw[6:12], "big") / 2**48
        split = "train" if share < 0.7 else "val" if share < 0.8 else "test"
        lines.append(f"{patient},{min(hospital, len(SIZES) - 1)},{split}")
    texts = {name: np.array(column, dtype=object) for name, column in columns.items()}
    write_table(files.encounters, "parquet", texts)
    write_text(files.partition, "\n".join(lines) + "\n")


def _mark(folder: Path, name: str) -> None:
    """Say beside the files what they are, before they are there: a folder with half of them is not taken for real."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _MARK, name + "\n")


def _marked(folder: Path) -> str | None:
    """What a folder's files are, if a demonstration wrote them. Raises: FedmeshError(DATA_INVALID)."""
    path = folder / _MARK
    try:
        name = path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FedmeshError(Code.DATA_INVALID, f"cannot read {path}: {error.strerror}") from error
    if name not in (SYNTHETIC, DIABETES130):
        raise FedmeshError(
            Code.DATA_INVALID,
            f"{path} must say {SYNTHETIC} or {DIABETES130}: delete it if the files beside it are diabetes-130 data",
        )
    return name


def _first(folder: Path, names: tuple[str, ...], what: str, otherwise: str = "") -> Path:
    if not folder.is_dir():
        raise FedmeshError(Code.DATA_INVALID, f"there is no folder {folder}")
    for name in names:
        if (folder / name).is_file():
            return (folder / name).absolute()
    raise FedmeshError(Code.DATA_INVALID, f"{folder} lacks {what}: expected {' or '.join(names)}{otherwise}")


def _described(name: str, files: CohortFiles) -> DemoData:
    try:
        with duckdb.connect() as connection:
            rows = connection.execute(
                "select distinct hospital from read_csv($path, header = true, all_varchar = true)",
                {"path": str(files.partition)},
            ).fetchall()
    except duckdb.Error as error:
        raise FedmeshError(
            Code.DATA_INVALID, f"{files.partition.name} is not a CSV with columns patient_nbr,hospital,split"
        ) from error
    values = sorted((str(row[0]) for row in rows if row[0] is not None), key=lambda text: (len(text), text))
    if not values:
        raise FedmeshError(Code.DATA_INVALID, f"{files.partition.name} assigns no patient to a hospital")
    is_synthetic = name == SYNTHETIC
    return DemoData(name, files.encounters.absolute(), files.partition.absolute(), tuple(values), is_synthetic)
