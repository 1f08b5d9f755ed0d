"""Which data a curve may be drawn on: every point of it is a release that nobody has charged.

Synthetic and public data only. Real records are charged: a hospital learns the value of a model on its own patients by
a job, whose metrics are noised and entered into its ledger.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import duckdb

from services.common.errors import Code, FedmeshError
from services.demo import datasets
from services.demo.datasets import DemoData
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.sources.table import interruptible
from services.plans.manifest import PlanManifest
from services.secure_sum.cohort import require_private

# SHA-256 in hex over the sorted encounter ids of the public diabetes-130 file (UCI id 296), joined by commas.
PUBLIC_ENCOUNTERS: Final = frozenset({"7182b53a783913a94a8765cececadca5ded04e4e6334eb1d87e4446b3cf5dbf8"})


def public_folder(folder: Path, plan: PlanManifest, declared_public: bool) -> DemoData:
    """The data of a folder, if it is synthetic, known to be public, or declared to be.

    Raises: FedmeshError(PRIVACY_REFUSED) for anything else; as `datasets.from_folder`.
    """
    found = datasets.from_folder(folder, plan)
    if not (found.synthetic or declared_public or encounters_sha256(found.encounters, plan) in PUBLIC_ENCOUNTERS):
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"{folder} is neither synthetic nor a public data set that fedmesh knows. Each point of a curve is a "
            "release: on real patients it has to be noised and charged to their ledger, which only a job does. Use "
            "--synthetic, or --public if everybody may have these records anyway",
        )
    return found


def encounters_sha256(encounters: Path, plan: PlanManifest) -> str | None:
    """SHA-256 in hex over a file's sorted encounter ids, joined by commas; None when it cannot be read."""
    column = plan.feature_schema.encounter_id
    kind = "parquet" if encounters.suffix == ".parquet" else "csv"
    options = "" if kind == "parquet" else ", header = true, all_varchar = true"
    try:
        with interruptible(), duckdb.connect() as database:
            # Else DuckDB draws a bar between the lines of the report when the query takes two seconds.
            database.execute("SET enable_progress_bar = false")
            row = database.execute(
                "SELECT sha256(string_agg(id, ',' ORDER BY id)) FROM "  # noqa: S608 - a schema's identifier
                f'(SELECT CAST("{column}" AS VARCHAR) AS id FROM read_{kind}($path{options}))',
                {"path": str(encounters)},
            ).fetchone()
    except duckdb.Error:
        # What is wrong with the file is told by whoever reads it.
        return None
    return None if row is None else row[0]


def read_hospitals(data: DemoData, plan: PlanManifest) -> list[Dataset]:
    """Every hospital's data set; there must be validation rows with either outcome.

    Raises: FedmeshError(PRIVACY_REFUSED) for fewer than four hospitals; DATA_INVALID.
    """
    require_private(len(data.hospitals))
    sets = [
        read_dataset(data.encounters, plan, partition=PartitionFile(data.partition, hospital))
        for hospital in data.hospitals
    ]
    _require_outcomes(sets)
    return sets


def _require_outcomes(sets: Sequence[Dataset]) -> None:
    outcomes = {float(label) for data in sets for label in data.y[data.split == SplitName.VALIDATION]}
    if outcomes != {0.0, 1.0}:
        raise FedmeshError(
            Code.DATA_INVALID,
            "the validation rows of all hospitals together must have both outcomes, or no model can be judged",
        )
