"""A hospital is suspended in the middle of a round, with every part a process of its own.

Real services, real hospital nodes with certificates that the registry issued and that they renew by themselves; only
the learning rule is a small one (NumPy), because nothing here is about it.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from fedmesh.registry.v1 import membership_pb2, registry_pb2, registry_pb2_grpc

from services.cli import enrolling, membership
from services.cli.mesh import stub
from services.cli.tokens import read_token
from services.common.config import TlsConfig
from services.common.credentials import ENROLMENT as FIRST
from services.common.credentials import CredentialFolder
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.ids import new_id
from services.demo.run import APPROVER, prepare
from services.embedded.guard import Guard
from services.embedded.stack import ENROLMENT, Stack
from services.secure_sum.statements import EpochStatement, parse
from tests.support.mesh import small_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]

# t = 4 of 5: rounds go on without one.
NAMES = [f"hospital-{number:02d}" for number in range(1, 6)]
OUT = NAMES[4]
LIFETIME_S = 120.0
PATIENCE_S = 240.0


class Consortium:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guard = Guard()
        short = {"registry": {"enrolment": {"lifetime_s": LIFETIME_S, "per_minute": 600, "burst": 60}}}
        self.stack = Stack(folder / "stack", guard=self.guard, settings=short)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def credentials(self, name: str) -> CredentialFolder:
        return CredentialFolder(self.folder / name / "tls")

    async def enrol(self, name: str) -> None:
        """As `fedmesh members invite` and `fedmesh hospital enrol` do."""
        token_file = self.folder / f"{name}.token"
        await asyncio.to_thread(membership.invite, name, token_file, "1h", "a test", self.stack.folder)
        await self.approve()
        token, folder = read_token(token_file), CredentialFolder(self.credentials(name).folder, FIRST)
        authority = self.stack.ca_file.read_bytes()
        folder.trust(authority)
        address = self.stack.target(ENROLMENT)
        folder.install(await enrolling.ask(address, authority, token, folder.request(name), 30), name)

    async def approve(self) -> None:
        """Approve the change that was proposed last, as another operator."""
        async with stub(self.stack, "membership", operator=APPROVER) as second:
            newest = (await call(second.ListMembershipChanges, membership_pb2.ListMembershipChangesRequest())).changes[
                0
            ]
            await asyncio.to_thread(membership.approve, newest.change_id, self.stack.folder, APPROVER)

    def start(self, name: str) -> None:
        (self.folder / name / "data.csv").write_text(f"data of {name}")
        tls = {key: str(path) for key, path in self.credentials(name).tls}
        settings = {
            "tls": tls,
            "renewal": {"folder": str(self.credentials(name).folder)},
            "population": name,
            "data": {"file": str(self.folder / name / "data.csv")},
            "privacy": {"allow_without_privacy": True},
        }
        config = self.folder / name / "node.yaml"
        config.write_text(yaml.safe_dump(self.stack._hospital_config(name, settings)))
        with (self.folder / name / "log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.support.hospital_process", "--config", str(config)], stderr=log
            )

    def stop(self) -> None:
        for node in self.nodes.values():
            node.terminate()
        for node in self.nodes.values():
            node.wait(60)
        self.stack.stop()
        self.guard.close()


@pytest.fixture
async def consortium(tmp_path: Path) -> AsyncIterator[Consortium]:
    made = Consortium(tmp_path)
    try:
        await asyncio.to_thread(made.stack.start)
        yield made
    finally:
        await asyncio.to_thread(made.stop)


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Wait for what a condition returns, until it is true."""
    ending = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(FedmeshError):
            found = await condition()
            if found:
                return found
        assert time.monotonic() < ending, f"never came: {what}"
        await asyncio.sleep(0.1)


async def refusals(stack: Stack, tls: TlsConfig) -> dict[str, float]:
    """Seconds after which each service refuses a hospital for good, measured from now."""
    began = time.monotonic()

    async def refused(service: str, ask: Callable[[MeshChannel], Awaitable[Any]]) -> float:
        async def denied() -> bool:
            async with MeshChannel(stack.target(service), tls) as channel:
                try:
                    await ask(channel)
                except FedmeshError as error:
                    return error.code is Code.PERMISSION_DENIED
            return False

        await until(denied, f"a refusal by {service}")
        return time.monotonic() - began

    async def sums(channel: MeshChannel) -> None:
        asked = aggregator_pb2.DownloadSumRequest()
        async for _ in stream(channel.stub(aggregator_pb2_grpc.AggregatorServiceStub).DownloadSum, asked, timeout_s=20):
            pass

    questions: dict[str, Callable[[MeshChannel], Awaitable[Any]]] = {
        "registry": lambda c: call(
            c.stub(registry_pb2_grpc.RegistryServiceStub).GetEpoch, registry_pb2.GetEpochRequest()
        ),
        "coordinator": lambda c: call(
            c.stub(coordinator_pb2_grpc.CoordinatorServiceStub).ReportReady, coordinator_pb2.ReportReadyRequest()
        ),
        "aggregator": sums,
        "audit": lambda c: call(
            c.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint, audit_pb2.GetCheckpointRequest()
        ),
    }
    found = await asyncio.gather(*(refused(service, ask) for service, ask in questions.items()))
    return dict(zip(questions, found, strict=True))


async def test_a_hospital_that_is_suspended_in_a_round_reads_nothing_more(consortium: Consortium) -> None:
    stack = consortium.stack
    stack.found(NAMES)
    async with (
        stub(stack, "registry") as registry,
        stub(stack, "registry", stack.operator(APPROVER)) as second,
        stub(stack, "coordinator") as coordinator,
    ):
        plan_id = await prepare(registry, second, stack, small_plan(1000, phase_s=60.0), NAMES)
        for name in NAMES:
            await consortium.enrol(name)
            consortium.start(name)

        async def connected() -> bool:
            listed = await call(coordinator.ListParticipants, coordinator_pb2.ListParticipantsRequest())
            return {item.hospital_id for item in listed.participants} == set(NAMES)

        await until(connected, "all hospitals")
        request = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=NAMES)
        job_id = (await call(registry.CreateJob, request)).job.job_id

        async def rounds(after: int = 0) -> list[Any]:
            asked = registry_pb2.ListRoundsRequest(job_id=job_id, after_version=after, page_size=500)
            return list((await call(registry.ListRounds, asked)).rounds)

        async def version() -> int:
            return int((await call(registry.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job.version)

        def counts(name: str, done: Any) -> bool:
            return name in {item.hospital_id for item in done.contributions}

        async def counted(name: str, after: int, *, present: bool) -> int:
            found = [done.version for done in await rounds(after) if not done.burnt and counts(name, done) is present]
            return int(found[-1]) if found else 0

        await until(lambda: counted(OUT, 0, present=True), "a round with everybody")
        epoch = await call(registry.GetEpoch, registry_pb2.GetEpochRequest())
        serials = {name: consortium.credentials(name).tls.certificate.resolve() for name in NAMES}
        await until(lambda: _in_round(coordinator, job_id), "the middle of a round")
        await asyncio.to_thread(membership.suspend, OUT, "a test", stack.folder)
        print("refused after", await refusals(stack, consortium.credentials(OUT).tls))
        await until(lambda: _told_by(stack), "the refusals of all four services in the audit log")
        held = consortium.credentials(OUT).tls.certificate.resolve()
        now = await version()
        went_on = await until(lambda: counted(OUT, now, present=False), "a round without it")

        async def next_epoch() -> Any:
            found = await call(registry.GetEpoch, registry_pb2.GetEpochRequest())
            return found if parse(EpochStatement, found.epoch.statement).epoch > _number(epoch) else None

        made = await until(next_epoch, "the next key epoch")
        boxes = {box.to for box in parse(EpochStatement, made.epoch.statement).boxes}
        assert (boxes, list(made.barred)) == (set(NAMES) - {OUT}, [OUT])
        assert not any(counts(OUT, done) for done in await rounds(went_on))

        async def renewed() -> bool:
            return all(consortium.credentials(name).tls.certificate.resolve() != serials[name] for name in NAMES[:4])

        await until(renewed, "new certificates of the others")
        assert consortium.credentials(OUT).tls.certificate.resolve() == held

        # Reinstated and invited once more, because its certificate may have ended: keys are made with it again.
        await asyncio.to_thread(membership.reinstate, OUT, "a test", stack.folder)
        await consortium.approve()
        (consortium.folder / f"{OUT}.token").unlink()
        await consortium.enrol(OUT)
        now = await version()
        await until(lambda: counted(OUT, now, present=True), "a round with it again")
        newest = await call(registry.GetEpoch, registry_pb2.GetEpochRequest())
        assert OUT in {box.to for box in parse(EpochStatement, newest.epoch.statement).boxes}


async def _told_by(stack: Stack) -> bool:
    """Whether the audit log has refusals of the suspended hospital by every service."""
    async with stub(stack, "audit") as audit:
        leaves = [json.loads(item.leaf) async for item in stream(audit.ListEntries, audit_pb2.ListEntriesRequest())]
    told = [leaf for leaf in leaves if (leaf["type"], leaf["subject"]) == ("access.refused", f"hospital/{OUT}")]
    by = {leaf["actor"].rsplit("/", 1)[1] for leaf in told if "is suspended" in leaf["body"]["reason"]}
    return by == {"audit", "registry", "coordinator", "aggregator"}


async def _in_round(coordinator: Any, job_id: str) -> bool:
    found = await call(coordinator.GetRound, coordinator_pb2.GetRoundRequest(job_id=job_id))
    return bool(found.phase)


def _number(answer: Any) -> int:
    return parse(EpochStatement, answer.epoch.statement).epoch
