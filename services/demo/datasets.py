"""Where the demonstration's data comes from: made here, read from a folder, or fetched from OpenML."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import numpy as np

from services.common.errors import Code, FedmeshError
from services.demo.synthetic import SIZES, CohortFiles, generate
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import check_columns
from services.plans.manifest import PlanManifest

SYNTHETIC: Final = "synthetic"
DIABETES130: Final = "diabetes130"
_OPENML_ID: Final = 4541
_FETCH_TIMEOUT_HINT: Final = (
    "no answer from OpenML: this machine may have no internet access. Use --data DIR with a folder that holds "
    "diabetic_data.parquet (or .csv) and partition15.csv, or leave both options out for the synthetic cohort"
)


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
        return f"{self.name}: real encounters, hospitals assigned by a synthetic partition"


def synthetic(folder: Path, hospitals: int) -> DemoData:
    """Make the synthetic cohort of 2 to 15 hospitals in a folder."""
    files = generate(folder, SIZES[:hospitals])
    return _described(SYNTHETIC, files, is_synthetic=True)


def from_folder(folder: Path, plan: PlanManifest) -> DemoData:
    """Use diabetes-130 files: `diabetic_data.parquet` or `.csv`, and a partition CSV (patient_nbr,hospital,split).

    Raises: FedmeshError(DATA_INVALID) naming the file or the columns that the plan misses.
    """
    encounters = _first(folder, ("diabetic_data.parquet", "diabetic_data.csv"), "the encounters")
    partition = _first(folder, ("partition15.csv", "partition.csv"), "the partition (patient_nbr,hospital,split)")
    # Here, where the person waits, and not at the hospitals: those would only decline the job.
    check_columns(encounters, plan, PartitionFile(partition, hospital=""))
    return _described(DIABETES130, CohortFiles(encounters, partition), is_synthetic=False)


def fetch_openml(folder: Path, say: Callable[[str], None]) -> DemoData:
    """Fetch diabetes-130 from OpenML, and assign its patients to fifteen hospitals by a hash of their number.

    Raises: FedmeshError(SERVICE_UNAVAILABLE) without internet; (DATA_INVALID) when the answer is something else.
    """
    from sklearn.datasets import fetch_openml as sklearn_fetch

    files = CohortFiles(folder / "diabetic_data.parquet", folder / "partition15.csv")
    folder.mkdir(parents=True, exist_ok=True)
    if not (files.encounters.exists() and files.partition.exists()):
        say(f"Fetching diabetes-130 from OpenML (data set {_OPENML_ID}, about 20 MB) ...")
        try:
            bunch = sklearn_fetch(data_id=_OPENML_ID, as_frame=True, parser="liac-arff", n_retries=1, delay=0.5)
        except Exception as error:
            # scikit-learn lets through whatever urllib, http or the cache raise.
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, _FETCH_TIMEOUT_HINT) from error
        frame = bunch.frame.astype(str).replace({"nan": "?", "None": "?"})
        missing = {"encounter_id", "patient_nbr", "readmitted"} - set(frame.columns)
        if missing:
            raise FedmeshError(Code.DATA_INVALID, f"OpenML's data set {_OPENML_ID} lacks {', '.join(sorted(missing))}")
        _save(frame, files)
    return _described(DIABETES130, files, is_synthetic=False)


def _save(frame: object, files: CohortFiles) -> None:
    patients = sorted(set(frame["patient_nbr"]))  # type: ignore[index]
    weights = np.array(SIZES) / sum(SIZES)
    cuts = np.cumsum(weights)
    lines = ["patient_nbr,hospital,split"]
    for patient in patients:
        draw = hashlib.sha256(f"fedmesh-partition/{patient}".encode()).digest()
        hospital = int(np.searchsorted(cuts, int.from_bytes(draw[:6], "big") / 2**48, side="right"))
        share = int.from_bytes(draw[6:12], "big") / 2**48
        split = "train" if share < 0.7 else "val" if share < 0.8 else "test"
        lines.append(f"{patient},{min(hospital, len(SIZES) - 1)},{split}")
    files.partition.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false")
        connection.register("rows_to_write", frame)
        connection.execute("copy rows_to_write to $path (format parquet)", {"path": str(files.encounters)})


def _first(folder: Path, names: tuple[str, ...], what: str) -> Path:
    if not folder.is_dir():
        raise FedmeshError(Code.DATA_INVALID, f"there is no folder {folder}")
    for name in names:
        if (folder / name).is_file():
            return (folder / name).absolute()
    raise FedmeshError(Code.DATA_INVALID, f"{folder} lacks {what}: expected {' or '.join(names)}")


def _described(name: str, files: CohortFiles, *, is_synthetic: bool) -> DemoData:
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
    return DemoData(name, files.encounters.absolute(), files.partition.absolute(), tuple(values), is_synthetic)
