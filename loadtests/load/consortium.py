"""The stack of a load test: founded by fifteen hospitals, with a job, and with hundreds more that only wait."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2

from loadtests.chaos.calls import HOSPITAL, OPERATOR, SERVICE, STUBS, Known, plan_document
from loadtests.load.settings import MEMBERS, Options
from services.bench.secure_sum import BenchOptions, bench_plan
from services.common.config import TlsConfig
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.embedded.ca import load_ca
from services.embedded.stack import Stack
from services.plans.manifest import canonical_bytes
from services.secure_sum.roster import read_roster_file

PATIENCE_S: Final = 30.0
# Attempts without hospital nodes end at their deadline; the job must outlive the run.
SETTINGS: Final = {"coordinator": {"rounds": {"max_attempts": 1000}}}
_AT_ONCE: Final = 8


def member_names() -> list[str]:
    """The founding hospitals."""
    return [f"hospital-{number:02d}" for number in range(1, MEMBERS + 1)]


class Clients:
    """Channels by caller and service, made when first used; every hospital has its own certificate."""

    def __init__(self, stack: Stack, hospitals: Sequence[str], closing: AsyncExitStack) -> None:
        self._stack, self._closing = stack, closing
        authority = load_ca(stack.folder / "ca")
        folder = authority.folder
        self.tls: dict[str, TlsConfig] = {name: authority.issue_hospital(name) for name in hospitals}
        self.tls[OPERATOR], self.tls["second"] = authority.issue_operator("olga"), authority.issue_operator("piet")
        self.tls[SERVICE] = TlsConfig(
            ca=stack.ca_file, certificate=folder / "coordinator.pem", key=folder / "coordinator.key"
        )
        self._hospitals, self._turn = list(hospitals), 0
        self._stubs: dict[tuple[str, str], Any] = {}

    async def of(self, caller: str, service: str) -> Any:
        """A stub. caller: a hospital's id, or a kind of caller; of hospitals the next founding one."""
        if caller == HOSPITAL:
            self._turn = (self._turn + 1) % MEMBERS
            caller = self._hospitals[self._turn]
        if (caller, service) not in self._stubs:
            channel = MeshChannel(self._stack.target(service), self.tls[caller])
            await self._closing.enter_async_context(channel)
            self._stubs[caller, service] = channel.stub(STUBS[service])
        return self._stubs[caller, service]


async def begin(stack: Stack, clients: Clients, hospitals: Sequence[str], options: Options) -> Known:
    """Register everybody, publish the roster, have a plan approved and start the job of the founding hospitals.

    Raises: FedmeshError as the calls.
    """
    registry, other = await clients.of(OPERATOR, "registry"), await clients.of("second", "registry")
    turns = asyncio.Semaphore(_AT_ONCE)

    async def register(name: str) -> None:
        request = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=name)
        async with turns:
            await call(registry.RegisterHospital, request, patience_s=PATIENCE_S)

    await asyncio.gather(*(register(name) for name in hospitals))
    statement, signatures = read_roster_file(stack.roster_file)
    signed = [round_pb2.Signature(hospital_id=name, signature=value) for name, value in signatures.items()]
    roster = registry_pb2.PublishRosterRequest(request_id=new_id(), statement=statement, signatures=signed)
    await call(registry.PublishRoster, roster, patience_s=PATIENCE_S)
    manifest = canonical_bytes(
        bench_plan(BenchOptions(folder=stack.folder, params=min(options.params), hospitals=MEMBERS, rounds=1000))
    )
    proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=manifest)
    plan_id = (await call(registry.CreatePlan, proposal, patience_s=PATIENCE_S)).plan.plan_id
    approval = registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)
    await call(other.ApprovePlan, approval, patience_s=PATIENCE_S)
    job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=member_names())
    made = (await call(registry.CreateJob, job, patience_s=PATIENCE_S)).job
    return Known(made.job_id, plan_document(manifest))
