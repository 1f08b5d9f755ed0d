"""Coordinators and an aggregator as real processes, a registry in memory, and simulated hospitals around them."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.common.config import RedisConfig
from services.common.grpc.client import MeshChannel, call
from services.embedded.ca import CertificateAuthority, create_ca
from services.plans.document import canonical_json
from services.plans.manifest import PlanManifest, load_manifest, parse_manifest
from services.secure_sum import secret
from services.secure_sum.roster import MemberKeys, Roster
from tests.support.fake_registry import FakeRegistry
from tests.support.service_process import ServiceProcess
from tests.support.simulated_hospital import Consortium, SimulatedHospital
from tests.support.stores import RedisServer

PLANS = Path(__file__).parents[2] / "plans"


def small_plan(
    rounds: int = 2,
    *,
    ready_s: float = 30.0,
    phase_s: float = 20.0,
    extra_attempts: int | None = None,
    asynchronous: tuple[int, int] | None = None,
) -> PlanManifest:
    """The readmission plan with few rounds and no checks; extra_attempts: with privacy; asynchronous: k, max_age."""
    name = "readmission-logistic.yaml" if extra_attempts is None else "readmission-logistic-private.yaml"
    plan = load_manifest(PLANS / name)
    limits = plan.rounds.model_copy(update={"count": rounds, "ready_deadline_s": ready_s, "phase_deadline_s": phase_s})
    if asynchronous is not None:
        k, max_age = asynchronous
        limits = limits.model_copy(update={"mode": "asynchronous", "k": k, "max_age": max_age})
    update: dict[str, Any] = {"rounds": limits, "checks": None}
    if plan.privacy is not None:
        update["privacy"] = plan.privacy.model_copy(update={"extra_attempts": extra_attempts})
    return parse_manifest(canonical_json(plan.model_copy(update=update)))


@dataclass
class Mesh:
    """Everything but the hospitals' tasks, which a test starts."""

    ca: CertificateAuthority
    registry: FakeRegistry
    coordinators: list[ServiceProcess]
    aggregators: list[ServiceProcess]
    manifest: PlanManifest
    hospitals: dict[str, SimulatedHospital]

    @property
    def roster(self) -> Roster:
        assert self.registry.roster is not None
        return self.registry.roster

    async def start_hospitals(self, names: Sequence[str] | None = None) -> None:
        """Start hospitals and wait until they are connected."""
        started = list(self.hospitals if names is None else names)
        for name in started:
            self.hospitals[name].start()
        connected: set[str] = set()
        while not set(started) <= connected:
            connected = {item.hospital_id for item in (await self.participants()).participants}
            await asyncio.sleep(0.05)

    def create_job(self, names: Sequence[str] | None = None) -> str:
        return self.registry.create_job(self.manifest, list(names or self.hospitals))

    async def participants(self) -> coordinator_pb2.ListParticipantsResponse:
        request = coordinator_pb2.ListParticipantsRequest()
        answer: coordinator_pb2.ListParticipantsResponse = await self._ask("ListParticipants", request)
        return answer

    async def round(self, job_id: str) -> coordinator_pb2.GetRoundResponse:
        request = coordinator_pb2.GetRoundRequest(job_id=job_id)
        answer: coordinator_pb2.GetRoundResponse = await self._ask("GetRound", request)
        return answer

    async def _ask(self, name: str, request: Any) -> Any:
        async with MeshChannel(self.coordinators[0].target, self.ca.issue_operator("olga")) as channel:
            stub = channel.stub(coordinator_pb2_grpc.CoordinatorServiceStub)
            return await call(getattr(stub, name), request, timeout_s=5, patience_s=20)

    async def ended(self, names: Sequence[str] | None = None, within_s: float = 120.0) -> None:
        """Wait until hospitals have heard that the job ended."""
        waiting = [self.hospitals[name].finish() for name in (self.hospitals if names is None else names)]
        try:
            await asyncio.wait_for(asyncio.gather(*waiting), within_s)
        except TimeoutError:
            log = "".join(line for process in (*self.coordinators, *self.aggregators) for line in process.log[-30:])
            raise AssertionError(f"hospitals still wait after {within_s} s:\n{log}") from None

    def expected_sum(self, committed: Any) -> Any:
        """The plaintext that a committed round's sum must have."""
        key = (committed.attempt.round, committed.attempt.attempt)
        return sum(self.hospitals[item.hospital_id].values(*key) for item in committed.contributions)


@asynccontextmanager
async def running_mesh(
    folder: Path,
    redis_server: RedisServer,
    *,
    hospitals: int = 4,
    coordinators: int = 1,
    aggregators: int = 1,
    manifest: PlanManifest | None = None,
    coordinator: dict[str, Any] | None = None,
) -> AsyncIterator[Mesh]:
    """Start everything, and end everything.

    coordinator: sections that differ from the defaults; of the section `server`, settings.
    """
    ca = create_ca(folder / "ca", "testmesh")
    registry = FakeRegistry()
    to_registry = await registry.start(ca.issue_service("registry"))
    aggregating = [
        ServiceProcess("aggregator", _config(ca, "aggregator", redis_server, to_registry), folder)
        for _ in range(aggregators)
    ]
    processes = list(aggregating)
    simulated: dict[str, SimulatedHospital] = {}
    try:
        await asyncio.gather(*(process.start() for process in aggregating))
        config = _config(ca, "coordinator", redis_server, to_registry)
        config |= {"aggregator": {"target": aggregating[0].target}, "driver": {"job_poll_s": 0.2, "lease_s": 1.5}}
        server = config["server"] | (coordinator or {}).get("server", {})
        config |= {"rounds": {"absence_grace_s": 1.0, "answer_grace_s": 1.0}} | (coordinator or {}) | {"server": server}
        coordinating = [
            ServiceProcess("coordinator", {**config, "server": dict(config["server"])}, folder)
            for _ in range(coordinators)
        ]
        processes += coordinating
        await asyncio.gather(*(process.start() for process in coordinating))
        manifest = manifest or small_plan()
        keys = [MemberKeys.generate(f"h{number:02d}") for number in range(1, hospitals + 1)]
        shared = Consortium(
            [process.target for process in coordinating],
            aggregating[0].target,
            manifest,
            secret.generate_group_key(),
            registry.found_roster("testmesh", keys),
        )
        for key in keys:
            simulated[key.hospital_id] = SimulatedHospital(key, ca.issue_hospital(key.hospital_id), shared)
        yield Mesh(ca, registry, coordinating, aggregating, manifest, simulated)
    finally:
        await asyncio.gather(*(hospital.stop() for hospital in simulated.values()))
        codes = await asyncio.gather(*(process.stop() for process in processes if process.started))
        await registry.stop()
        assert set(codes) <= {0, -signal.SIGKILL}, [line for process in processes for line in process.log]


def _config(ca: CertificateAuthority, name: str, redis_server: RedisServer, registry: str) -> dict[str, Any]:
    redis: RedisConfig = redis_server.config(name)
    tls = ca.issue_service(name)
    return {
        "server": {"tls": tls.model_dump(mode="json"), "drain_s": 1},
        "redis": redis.model_dump(mode="json"),
        "registry": {"target": registry},
    }
