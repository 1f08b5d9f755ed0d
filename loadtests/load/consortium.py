"""The consortium of a load test: founded by fifteen hospitals, with a job; hundreds more join to wait."""

import asyncio
from typing import Any, Final

from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2

from loadtests.chaos import calls
from loadtests.chaos.calls import HOSPITAL, OPERATOR, STUBS, Known, plan_document
from loadtests.load.settings import MEMBERS
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


def member_names() -> list[str]:
    """The founding hospitals."""
    return [hospital_name(number) for number in range(1, MEMBERS + 1)]


def hospital_name(number: int) -> str:
    """The founding hospitals come first, then those that only wait."""
    return f"hospital-{number:02d}" if number <= MEMBERS else f"idle-{number:04d}"


class Clients:
    """Channels by caller and service, made when first used; every hospital has its own certificate."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._authority = stack, load_ca(stack.folder / "ca")
        self._members, self._turn = member_names(), 0
        self._registered: set[str] = set()
        self._tls: dict[str, TlsConfig] = {}
        self._channels: dict[tuple[str, str], tuple[MeshChannel, Any]] = {}

    async def __aenter__(self) -> "Clients":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.gather(*(channel.close() for channel, _ in self._channels.values()))

    async def of(self, caller: str, service: str) -> Any:
        """A stub. caller: a hospital's id, or a kind of caller; of hospitals the next founding one."""
        if caller == HOSPITAL:
            self._turn = (self._turn + 1) % MEMBERS
            caller = self._members[self._turn]
        if (caller, service) not in self._channels:
            channel = await MeshChannel(self._stack.target(service), self._identity(caller)).__aenter__()
            self._channels[caller, service] = channel, channel.stub(STUBS[service])
        return self._channels[caller, service][1]

    async def register(self, name: str) -> None:
        """Make the hospital a member, once. Raises: FedmeshError."""
        if name not in self._registered:
            registry = await self.of(OPERATOR, "registry")
            request = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=name)
            await call(registry.RegisterHospital, request, patience_s=PATIENCE_S)
            self._registered.add(name)

    async def leave(self, name: str) -> None:
        """Close the hospital's connection to the coordinator."""
        if (found := self._channels.pop((name, "coordinator"), None)) is not None:
            await found[0].close()

    def _identity(self, caller: str) -> TlsConfig:
        if caller not in self._tls:
            folder = self._authority.folder
            match caller:
                case calls.OPERATOR:
                    tls = self._authority.issue_operator("olga")
                case "second":
                    tls = self._authority.issue_operator("piet")
                case calls.SERVICE:
                    tls = TlsConfig(
                        ca=self._stack.ca_file, certificate=folder / "coordinator.pem", key=folder / "coordinator.key"
                    )
                case _:
                    tls = self._authority.issue_hospital(caller)
            self._tls[caller] = tls
        return self._tls[caller]


async def begin(stack: Stack, clients: Clients, params: int) -> Known:
    """Register the founding hospitals, publish the roster, have a plan approved and start their job.

    params: integers of the plan's contributions. Raises: FedmeshError as the calls.
    """
    registry, other = await clients.of(OPERATOR, "registry"), await clients.of("second", "registry")
    await asyncio.gather(*(clients.register(name) for name in member_names()))
    statement, signatures = read_roster_file(stack.roster_file)
    signed = [round_pb2.Signature(hospital_id=name, signature=value) for name, value in signatures.items()]
    roster = registry_pb2.PublishRosterRequest(request_id=new_id(), statement=statement, signatures=signed)
    await call(registry.PublishRoster, roster, patience_s=PATIENCE_S)
    manifest = canonical_bytes(
        bench_plan(BenchOptions(folder=stack.folder, params=params, hospitals=MEMBERS, rounds=1000))
    )
    proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=manifest)
    plan_id = (await call(registry.CreatePlan, proposal, patience_s=PATIENCE_S)).plan.plan_id
    approval = registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)
    await call(other.ApprovePlan, approval, patience_s=PATIENCE_S)
    job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=member_names())
    made = (await call(registry.CreateJob, job, patience_s=PATIENCE_S)).job
    return Known(made.job_id, plan_document(manifest))
