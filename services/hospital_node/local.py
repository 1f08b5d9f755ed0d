"""Opens a plan's trainer on this hospital's data. Imports DuckDB and the training runtime: load it late."""

import hashlib
from pathlib import Path

from services.hospital_node.config import DataConfig
from services.hospital_node.domain.ports import LocalJob
from services.hospital_node.opening import mapping_of, opened_source, partition_of
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.training import state
from services.hospital_node.training.packages import check_installed
from services.hospital_node.training.trainer import Trainer
from services.plans.manifest import PlanManifest


class PlanTrainer(Trainer):
    """A compiled plan on local data; see `domain.ports.Trainer` for the contract."""

    def states_close(self, a: bytes, b: bytes) -> bool:
        return state.states_close(a, b)


def open_local_job(manifest: PlanManifest, data: DataConfig, cache: Path) -> LocalJob:
    """Read and check the data, compile the plan or take it from `cache`.

    Raises: FedmeshError(PLAN_INVALID for a family that is not trained or not installed, DATA_INVALID, CONFIG_INVALID,
        STORE_UNAVAILABLE when the hospital's database does not answer, or INTERNAL when compiling failed).
    """
    _ = manifest.network
    check_installed(manifest)
    with opened_source(data, manifest) as source:
        dataset = read_dataset(
            source,
            manifest,
            mapping_of(data),
            partition_of(data),
            merge_patients=data.patients_across_files == "merge",
        )
    return LocalJob(PlanTrainer(manifest, dataset, cache), _snapshot(data, dataset.content_sha256))


def _snapshot(data: DataConfig, content_sha256: str) -> str:
    """SHA-256 in hex over everything that decides which rows and numbers a job sees."""
    digest = hashlib.sha256(content_sha256.encode())
    for path in (data.mapping, None if data.partition is None else data.partition.file):
        digest.update(b"\0" if path is None else hashlib.sha256(path.read_bytes()).digest())
    if data.partition is not None:
        digest.update(data.partition.model_dump_json(exclude={"file"}).encode())
    return digest.hexdigest()
