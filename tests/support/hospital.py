"""Hospital nodes in this process, with a trainer that needs no TensorFlow."""

import asyncio
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from google.protobuf import timestamp_pb2

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.hospital_node.config import HospitalConfig
from services.hospital_node.domain.attacks import Attacked
from services.hospital_node.domain.ports import Int64Vector, LocalJob
from services.hospital_node.main import run_node
from services.hospital_node.training.attack import Attacks
from services.hospital_node.training.checking import find
from services.hospital_node.worker import WorkerThread
from services.plans.manifest import PlanManifest, canonical_bytes, load_manifest
from services.secure_sum.roster import MemberKeys, found, save_roster_file, sign_roster
from services.transparency.findings import Finding

PLANS = Path(__file__).parents[2] / "plans"
TIMEOUT_S = 90.0


class NumpyTrainer:
    """A tiny learning rule in NumPy: contributions follow from the data file's bytes, states are float64 vectors.

    lock: for the attack that a check makes. attack_error: what an attack on the hospital's own rows raises.
    """

    lock: Path | None = None
    attack_error: Exception | None = None

    def __init__(self, manifest: PlanManifest, content: bytes) -> None:
        self._manifest = manifest
        self._seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "big")

    def initial_state(self) -> bytes:
        return np.zeros(self._manifest.train_length).tobytes()

    def contribution(self, state: bytes, round_number: int) -> Int64Vector:
        values = np.zeros(self._manifest.vector_length, dtype=np.int64)
        base = np.frombuffer(state)
        part = np.random.default_rng(self._seed + round_number).integers(-1000, 1000, self._manifest.train_length)
        values[: self._manifest.train_length] = part - np.round(base).astype(np.int64)
        if round_number in self._manifest.metrics_rounds:
            values[self._manifest.train_length :] = 1
        return values

    def update(self, state: bytes, total: Int64Vector, contributors: int) -> bytes:
        return (np.frombuffer(state) + total[: self._manifest.train_length] / contributors).tobytes()

    def metrics(self, total: Int64Vector) -> dict[str, float | None]:
        return {"counted": float(total[self._manifest.train_length :].sum()), "auroc": None}

    def personalise(self, state: bytes) -> bytes:
        return (np.frombuffer(state) + self._seed).tobytes()

    def findings(self, peaks: Mapping[int, float], measured: Int64Vector) -> tuple[Finding, ...]:
        assert self.lock is not None, "a trainer of a node has one"
        return find(self._manifest, peaks, measured, Attacks(self.lock))

    def attack(self, state: bytes) -> tuple[Attacked, ...]:
        if self.attack_error is not None:
            raise self.attack_error
        return (Attacked("threshold", "all", 40, 30, (self._seed % 1000) / 1000, float(np.frombuffer(state)[0])),)

    def states_close(self, a: bytes, b: bytes) -> bool:
        if len(a) % 8 or len(b) % 8:
            raise FedmeshError(Code.INVALID_ARGUMENT, "not a state")
        return len(a) == len(b) and bool(np.allclose(np.frombuffer(a), np.frombuffer(b), rtol=1e-6))


@dataclass
class NumpyTrainers:
    """Opens `NumpyTrainer`s on the configured file. gate: a thread event that opening waits for."""

    config: HospitalConfig
    opened: int = 0
    error: Exception | None = None
    attack_error: Exception | None = None
    gate: Any = None

    def __call__(self, manifest: PlanManifest) -> LocalJob:
        if self.gate is not None:
            self.gate.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        self.opened += 1
        (path,) = self.config.data.tables
        content = path.read_bytes()
        trainer = NumpyTrainer(manifest, content)
        trainer.lock = self.config.data_dir / "check.lock"
        trainer.attack_error = self.attack_error
        return LocalJob(trainer, hashlib.sha256(content).hexdigest())


@functools.cache
def _shipped(name: str) -> bytes:
    return canonical_bytes(load_manifest(PLANS / f"{name}.yaml"))


def changed_plan(name: str = "readmission-logistic-private", **changes: Any) -> PlanManifest:
    """A shipped plan without checks, unless `changes` has some, and with other rounds or privacy."""
    document = {**json.loads(_shipped(name)), "checks": None}
    for section, values in changes.items():
        document[section] = {**(document[section] or {}), **values} if isinstance(values, dict) else values
    return PlanManifest.model_validate_json(json.dumps(document))


class Node:
    """One hospital node in this process; `kill` leaves its folder as a crash would."""

    def __init__(self, config: HospitalConfig) -> None:
        self.config = config
        self.trainers = NumpyTrainers(config)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._stop = asyncio.Event()
        self._task = asyncio.ensure_future(run_node(self.config, self.trainers, WorkerThread(), self._stop))
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """As by SIGTERM."""
        self._stop.set()
        if self._task is not None:
            await asyncio.wait_for(self._task, TIMEOUT_S)
            self._task = None

    async def kill(self) -> None:
        """Stop wherever it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None


def found_roster(path: Path, consortium: str, members: Sequence[MemberKeys]) -> None:
    """Write a founding roster that all members have signed."""
    statement = found(consortium, [keys.public() for keys in members])
    save_roster_file(path, statement, {keys.hospital_id: sign_roster(statement, keys) for keys in members})


def hospital_config(
    folder: Path, keys: MemberKeys, target: str, tls: TlsConfig, roster: Path, cache: Path
) -> HospitalConfig:
    """A node's settings, with a small data file and its member keys in `folder`."""
    hospital_id = keys.hospital_id
    home = folder / hospital_id
    home.mkdir()
    keys.save(home / "member.keys")
    (home / "data.csv").write_text(f"data of {hospital_id}")
    client = {"target": target}
    document = {
        "hospital_id": hospital_id,
        "tls": {name: str(path) for name, path in tls.model_dump().items()},
        "registry": client,
        "coordinator": client,
        "aggregator": client,
        "data": {"file": str(home / "data.csv")},
        "population": hospital_id,
        "data_dir": str(home / "node"),
        "member_keys": str(home / "member.keys"),
        "roster": str(roster),
        "compile_cache": str(cache),
    }
    (home / "hospital.yaml").write_text(yaml.safe_dump(document))
    return HospitalConfig.model_validate(document)


def deadline(seconds: float = 20.0) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return stamp
