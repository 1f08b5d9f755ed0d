"""`python -m services.bench.hospital --config FILE`: the real hospital node, with something light for training.

The node's `data.file` is JSON: `{"seed": 1, "hospital": 3}`. For a plan that only sums it contributes vectors that
follow from the seed, and notes what it decrypted beside that file by plan, as the BLAKE2b digest of the sum's
little-endian int64, so that the benchmark can check every hospital's sum. With `"train_s": {"some-plan": 0.5}` training
for that plan takes so many seconds, without CPU, as on a machine of the hospital's own. For a plan of any other kind it
has a small population that pays for that plan.
"""

import asyncio
import hashlib
import json
import signal
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.bench.cohort import CohortTrainer
from services.bench.vectors import WEIGHT_BITS, spare_bits, vector
from services.common.errors import Code, FedmeshError
from services.common.process import run_process
from services.common.telemetry import setup_telemetry, shutdown_telemetry
from services.hospital_node.config import HospitalConfig, check_config
from services.hospital_node.domain.attacks import Attacked
from services.hospital_node.domain.ports import Int64Vector, LocalJob
from services.hospital_node.main import run_node
from services.hospital_node.worker import WorkerThread
from services.plans.manifest import PlanManifest
from services.plans.models import IntegerVector
from services.transparency.findings import Finding

_HEADER: Final = struct.Struct("<4sI")
_MAGIC: Final = b"FMBV"
# Converted piece by piece: a float64 copy of a large sum would double the memory.
_PIECE: Final = 1 << 20


def sum_digest(total: Int64Vector) -> str:
    """BLAKE2b-256 of the sum as little-endian int64, in hex."""
    return hashlib.blake2b(np.ascontiguousarray(total, dtype="<i8").data, digest_size=32).hexdigest()


def noted_sums(data_file: Path, plan_name: str) -> dict[int, str]:
    """The digests that a hospital noted in a plan's rounds, by round."""
    folder = data_file.parent / "sums" / plan_name
    return {int(path.name): path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}


class VectorTrainer:
    """See `hospital_node.domain.ports.Trainer`. A state is a round number and the mean contribution as float32."""

    def __init__(self, manifest: PlanManifest, seed: int, hospital: int, sums: Path, train_s: float) -> None:
        self._length = manifest.vector_length
        self._lanes = manifest.encoding.lanes
        self._seed = seed
        self._hospital = hospital
        self._sums = sums
        self._train_s = train_s
        self._spare = spare_bits(manifest.encoding.parameters, self._lanes)
        if manifest.rounds.asynchronous:
            self._spare += WEIGHT_BITS

    def initial_state(self) -> bytes:
        return _HEADER.pack(_MAGIC, 0) + bytes(4 * self._length)

    def contribution(self, state: bytes, round_number: int) -> Int64Vector:
        time.sleep(self._train_s)
        # By the version trained on, whatever round it goes into.
        return vector(self._seed, self._hospital, _round(state) + 1, self._length, self._lanes, self._spare)

    def update(self, state: bytes, total: Int64Vector, contributors: int) -> bytes:
        round_number = _round(state) + 1
        (self._sums / str(round_number)).write_text(sum_digest(total))
        mean: npt.NDArray[np.float32] = np.empty(self._length, dtype="<f4")
        for start in range(0, self._length, _PIECE):
            piece = slice(start, start + _PIECE)
            mean[piece] = total[piece] / contributors
        return _HEADER.pack(_MAGIC, round_number) + mean.tobytes()

    def metrics(self, total: Int64Vector) -> dict[str, float | None]:
        return {}

    def states_close(self, a: bytes, b: bytes) -> bool:
        return a == b

    def personalise(self, state: bytes) -> bytes:
        raise FedmeshError(Code.WRONG_STATE, "a plan of integer vectors makes no personal models")

    def attack(self, state: bytes) -> tuple[Attacked, ...]:
        raise FedmeshError(Code.WRONG_STATE, "a plan of integer vectors has no checks")

    def findings(self, peaks: Mapping[int, float], measured: Int64Vector) -> tuple[Finding, ...]:
        raise FedmeshError(Code.WRONG_STATE, "a plan of integer vectors has no checks")


def _round(state: bytes) -> int:
    magic, round_number = _HEADER.unpack_from(state)
    if magic != _MAGIC:
        raise FedmeshError(Code.INVALID_ARGUMENT, "not a state of a benchmark's plan")
    return int(round_number)


async def main(config: HospitalConfig) -> None:
    """Run the node until SIGTERM or SIGINT. Raises: as `hospital_node.main.run_node`."""
    setup_telemetry(f"hospital/{config.hospital_id}", config.telemetry)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    content = config.data.tables[0].read_bytes()
    facts = json.loads(content)

    def open_job(manifest: PlanManifest) -> LocalJob:
        snapshot = hashlib.sha256(content).hexdigest()
        if isinstance(manifest.model, IntegerVector):
            sums = config.data.tables[0].parent / "sums" / manifest.name
            sums.mkdir(parents=True, exist_ok=True)
            train_s = float(facts.get("train_s", {}).get(manifest.name, 0.0))
            return LocalJob(VectorTrainer(manifest, facts["seed"], facts["hospital"], sums, train_s), snapshot)
        trainer = CohortTrainer(manifest, facts["seed"], facts["hospital"])
        return LocalJob(trainer, snapshot, population=f"{config.population}-{manifest.name}")

    await run_node(config, open_job, WorkerThread(), stop)
    shutdown_telemetry()


if __name__ == "__main__":
    sys.exit(run_process("hospital_node", HospitalConfig, main, check=check_config))
