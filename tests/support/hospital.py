"""A centre that a test leads by hand, and hospital nodes with a trainer that needs no TensorFlow.

The centre speaks the real protos over real mutual TLS and adds real BFV ciphertexts; only its decisions come from the
test.
"""

import asyncio
import functools
import hashlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from google.protobuf import timestamp_pb2

from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import CertificateAuthority
from services.embedded.processes import free_port
from services.hospital_node.config import HospitalConfig
from services.hospital_node.domain.ports import Int64Vector, LocalJob
from services.hospital_node.main import run_node
from services.hospital_node.worker import WorkerThread
from services.plans.manifest import PlanManifest, canonical_bytes, load_manifest
from services.secure_sum import public
from services.secure_sum.parameters import parameter_set

PLANS = Path(__file__).parents[2] / "plans"
TIMEOUT_S = 30.0


class NumpyTrainer:
    """A tiny learning rule in NumPy: contributions follow from the data file's bytes, states are float64 vectors."""

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
    gate: Any = None

    def __call__(self, manifest: PlanManifest) -> LocalJob:
        if self.gate is not None:
            self.gate.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        self.opened += 1
        content = self.config.data.file.read_bytes()
        return LocalJob(NumpyTrainer(manifest, content), hashlib.sha256(content).hexdigest())


@functools.cache
def _shipped(name: str) -> bytes:
    return canonical_bytes(load_manifest(PLANS / f"{name}.yaml"))


def changed_plan(name: str = "readmission-logistic-private", **changes: Any) -> PlanManifest:
    """A shipped plan with other rounds or privacy."""
    document = json.loads(_shipped(name))
    for section, values in changes.items():
        document[section] = {**document[section], **values} if isinstance(values, dict) else values
    return PlanManifest.model_validate_json(json.dumps(document))


@dataclass
class Faults:
    """What goes wrong: by method, errors raised before the centre acts, and after it acted."""

    before: dict[str, list[Exception]] = field(default_factory=dict)
    after: dict[str, list[Exception]] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)

    async def enter(self, method: str) -> None:
        if self.before.get(method):
            raise self.before[method].pop(0)
        if method in self.held:
            await self.held[method].wait()

    def leave(self, method: str) -> None:
        if self.after.get(method):
            raise self.after[method].pop(0)


class Centre:
    """Registry, coordinator and aggregator on one port."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self.config = ServerConfig(
            listen=f"127.0.0.1:{free_port()}", tls=ca.issue_service("centre"), drain_s=0, metrics_listen=None
        )
        self.server: MeshServer | None = None
        self.faults = Faults()
        self.plans: dict[str, bytes] = {}
        self.jobs: dict[str, registry_pb2.Job] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[tuple[tuple[str, int, int], str], list[bytes]] = {}
        self.forms: dict[tuple[str, int, int], Any] = {}
        self.sums: dict[tuple[str, int, int], bytes] = {}
        self.groups: dict[tuple[str, int, int], tuple[str, ...]] = {}
        self.reports: list[tuple[str, str, Any]] = []
        self.refuse: dict[str, FedmeshError] = {}
        self.watching: dict[str, asyncio.Queue[Any]] = {}
        self.cursors: list[tuple[str, str]] = []
        self.fingerprints: dict[str, str] = {}
        self._sent = 0
        self.changed = asyncio.Condition()

    async def start(self) -> None:
        self.server = MeshServer(
            self.config,
            [
                Endpoint(
                    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
                    registry_pb2_grpc.add_RegistryServiceServicer_to_server,
                    _Registry(self),
                ),
                Endpoint(
                    coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
                    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server,
                    _Coordinator(self),
                ),
                Endpoint(
                    aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"],
                    aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server,
                    _Aggregator(self),
                ),
            ],
        )
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop()
            self.server = None

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Any, what: str) -> None:
        """Wait until a condition on this centre holds."""
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(condition), TIMEOUT_S)
            except TimeoutError:
                kinds = [(hospital, kind) for hospital, kind, _ in self.reports]
                raise AssertionError(f"never came: {what}; reports so far: {kinds}") from None

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The last report of a kind by hospital."""
        return {hospital: request for hospital, name, request in self.reports if name == kind}

    def count(self, kind: str) -> int:
        return sum(name == kind for _, name, _ in self.reports)

    async def reported(self, kind: str, hospitals: Sequence[str], times: int = 1) -> dict[str, Any]:
        """Wait until each of `hospitals` has sent a report of a kind `times` times."""

        def enough() -> bool:
            sent = [hospital for hospital, name, _ in self.reports if name == kind]
            return all(sent.count(hospital) >= times for hospital in hospitals)

        await self.until(enough, f"{kind} from {list(hospitals)}")
        return self.of_kind(kind)

    async def connected(self, hospitals: Sequence[str]) -> None:
        await self.until(lambda: set(hospitals) <= set(self.watching), f"streams of {list(hospitals)}")

    def send(self, hospital: str, task: coordinator_pb2.Task) -> None:
        self._sent += 1
        response = coordinator_pb2.WatchTasksResponse(cursor=f"{self._sent}-0", task=task)
        self.watching[hospital].put_nowait(response)

    def sum_up(self, key: tuple[str, int, int], members: Sequence[str]) -> list[Any]:
        """Add the accepted uploads of `members`; their contributions."""
        form = self.forms[key]
        total = None
        for hospital in members:
            upload = self.uploads[key, hospital][0]
            params = parameter_set(form.parameter_set)
            total = public.add(total, upload, params, form.vector_length, form.lanes)
        assert total is not None
        self.sums[key] = total
        return [
            round_pb2.Contribution(
                hospital_id=hospital, ciphertext_sha256=hashlib.sha256(self.uploads[key, hospital][0]).hexdigest()
            )
            for hospital in members
        ]


class _Registry(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def GetPlan(self, request: Any, _context: Any) -> Any:
        await self._centre.faults.enter("GetPlan")
        if request.plan_id not in self._centre.plans:
            raise FedmeshError(Code.NOT_FOUND, "no such plan")
        plan = registry_pb2.Plan(plan_id=request.plan_id, manifest=self._centre.plans[request.plan_id])
        return registry_pb2.GetPlanResponse(plan=plan)

    async def GetJob(self, request: Any, _context: Any) -> Any:
        return registry_pb2.GetJobResponse(job=self._centre.jobs[request.job_id])

    async def UploadBlob(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        await self._centre.faults.enter("UploadBlob")
        header = (await anext(aiter(requests))).header
        content = b"".join([request.chunk async for request in requests])
        assert hashlib.sha256(content).hexdigest() == header.sha256
        self._centre.blobs[header.sha256] = content
        return registry_pb2.UploadBlobResponse(sha256=header.sha256)

    async def DownloadBlob(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        await self._centre.faults.enter("DownloadBlob")
        self._centre.reports.append((caller().name, "download_blob", request))
        if request.sha256 not in self._centre.blobs:
            raise FedmeshError(Code.NOT_FOUND, "no such blob")
        content = self._centre.blobs[request.sha256]
        for start in range(0, len(content), 1000):
            yield registry_pb2.DownloadBlobResponse(chunk=content[start : start + 1000])


class _Aggregator(aggregator_pb2_grpc.AggregatorServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def Upload(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        centre = self._centre
        header = (await anext(aiter(requests))).header
        content = b"".join([request.chunk async for request in requests])
        hospital = caller().name
        centre.reports.append((hospital, "bytes", content))
        await centre.notify()
        await centre.faults.enter("Upload")
        key = (header.attempt.job_id, header.attempt.round, header.attempt.attempt)
        form = header.form
        public.validate_upload(content, parameter_set(form.parameter_set), form.vector_length, form.lanes)
        centre.forms[key] = form
        centre.uploads.setdefault((key, hospital), []).append(content)
        centre.faults.leave("Upload")
        return aggregator_pb2.UploadResponse(
            contribution=round_pb2.Contribution(hospital_id=hospital, ciphertext_sha256=header.ciphertext_sha256)
        )

    async def DownloadSum(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        await self._centre.faults.enter("DownloadSum")
        key = (request.attempt.job_id, request.attempt.round, request.attempt.attempt)
        self._centre.reports.append((caller().name, "download_sum", request))
        content = self._centre.sums[key]
        for start in range(0, len(content), 10_000):
            yield aggregator_pb2.DownloadSumResponse(chunk=content[start : start + 10_000])


class _Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def WatchTasks(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        centre, hospital = self._centre, caller().name
        queue: asyncio.Queue[Any] = asyncio.Queue()
        centre.watching[hospital] = queue
        centre.cursors.append((hospital, request.cursor))
        centre.fingerprints[hospital] = request.group_key_fingerprint
        await centre.notify()
        try:
            yield coordinator_pb2.WatchTasksResponse(cursor=request.cursor)
            while True:
                try:
                    response = await asyncio.wait_for(queue.get(), 0.2)
                except TimeoutError:
                    response = coordinator_pb2.WatchTasksResponse()
                if response is None:
                    return
                yield response
        finally:
            if centre.watching.get(hospital) is queue:
                del centre.watching[hospital]

    async def _take(self, kind: str, request: Any) -> None:
        await self._centre.faults.enter(kind)
        refusal = self._centre.refuse.get(kind)
        self._centre.reports.append((caller().name, kind, request))
        await self._centre.notify()
        if refusal is not None:
            raise refusal
        self._centre.faults.leave(kind)

    async def ReportReady(self, request: Any, _context: Any) -> Any:
        await self._take("ready", request)
        return coordinator_pb2.ReportReadyResponse()

    async def ReportUpload(self, request: Any, _context: Any) -> Any:
        await self._take("uploaded", request)
        return coordinator_pb2.ReportUploadResponse()

    async def SubmitDigest(self, request: Any, _context: Any) -> Any:
        await self._take("digest", request)
        return coordinator_pb2.SubmitDigestResponse()

    async def SubmitState(self, request: Any, _context: Any) -> Any:
        await self._take("state", request)
        return coordinator_pb2.SubmitStateResponse()

    async def AttestState(self, request: Any, _context: Any) -> Any:
        await self._take("attest", request)
        return coordinator_pb2.AttestStateResponse()

    async def DeclineJob(self, request: Any, _context: Any) -> Any:
        await self._take("decline", request)
        return coordinator_pb2.DeclineJobResponse()


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


def hospital_config(
    folder: Path, hospital_id: str, target: str, tls: TlsConfig, group_key: bytes, cache: Path
) -> HospitalConfig:
    """A node's settings, with a small data file and the group key in `folder`."""
    home = folder / hospital_id
    home.mkdir()
    key_file = home / "group.key"
    descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(group_key)
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
        "group_key_file": str(key_file),
        "compile_cache": str(cache),
    }
    (home / "hospital.yaml").write_text(yaml.safe_dump(document))
    return HospitalConfig.model_validate(document)


def deadline(seconds: float = 20.0) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return stamp
