"""The loads of `fedmesh bench audit`: appends and inserts, by calls and without, in turns.

They are measured in short turns, one after another, again and again: what else the machine does then falls on all
alike, so that their ratios hold on a machine that is not idle.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import psutil
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.audit.domain.event import make_leaf
from services.audit.sequencer import Sequencer
from services.audit.servicer import read_event
from services.audit.store.postgres import PostgresStore
from services.bench.bounds import fdatasync_rate, plain_inserts, repeat
from services.bench.usage import store_cpu_seconds
from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from services.common.grpc.wire import from_rpc_error
from services.common.identity import parse_identity
from services.common.ids import new_id
from services.common.postgres import Database
from services.common.tasks import end_tasks
from services.embedded.guard import PACKAGE_ROOT
from services.embedded.stack import CONSORTIUM, Stack
from services.transparency.checkpoint import load_signing_key

_TURNS: Final = 4
_WARM_S: Final = 1.0
_TIMEOUT_S: Final = 30.0
_BODY: Final = json.dumps({"round": 1, "attempt": 1, "sha256": "0" * 64})

Work = Callable[[int], Awaitable[None]]


@dataclass
class Load:
    """Work of so many workers, and what came of it. cpu_s: CPU seconds of the service and of PostgreSQL."""

    work: Work
    cpu: Callable[[], float]
    workers: int
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0

    async def turn(self, seconds: float) -> None:
        """Work for so many seconds; what is under way then is waited for, and counts with its time."""
        before, began = self.cpu(), time.monotonic()
        self.latencies += await repeat(self.work, self.workers, seconds)
        self.seconds += time.monotonic() - began
        self.cpu_s += self.cpu() - before

    @property
    def per_s(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds for each piece of work."""
        return 1000 * self.cpu_s / max(1, len(self.latencies))


@dataclass(frozen=True)
class Loads:
    """nothing: calls that do nothing. plain, plain_many: calls that insert one row, or some. one, many: calls of the
    audit service with as many events. inserts, log: the same without calls, in this process. fdatasyncs_per_s: of the
    disk.
    """

    fdatasyncs_per_s: float
    inserts: Load
    log: Load
    nothing: Load
    plain: Load
    plain_many: Load
    one: Load
    many: Load


async def measure(stack: Stack, appenders: int, events: int, seconds: float) -> Loads:
    """Measure everything for so many seconds each. Raises: FedmeshError for a refused call."""
    async with AsyncExitStack() as opened:
        insert = await opened.enter_async_context(
            plain_inserts(stack.postgres.dsn(), appenders, _BODY, "audit_service")
        )
        plain = await opened.enter_async_context(_plain_service(stack))
        at_log = await opened.enter_async_context(_log(stack))
        plain_stubs = await _stubs(opened, stack, plain.target, appenders)
        stubs = await _stubs(opened, stack, stack.target("audit"), appenders)

        def audit_cpu() -> float:
            return store_cpu_seconds(stack, "audit")

        def plain_cpu() -> float:
            # PostgreSQL's share is what the audit service, idle now, does not add to.
            return audit_cpu() + sum(plain.process.cpu_times()[:2])

        loads = [
            Load(insert, audit_cpu, appenders),
            Load(at_log, audit_cpu, appenders),
            Load(_calls(plain_stubs, 0), plain_cpu, appenders),
            Load(_calls(plain_stubs, 1), plain_cpu, appenders),
            Load(_calls(plain_stubs, events), plain_cpu, appenders),
            Load(_calls(stubs, 1), audit_cpu, appenders),
            Load(_calls(stubs, events), audit_cpu, appenders),
        ]
        for load in loads:
            await repeat(load.work, appenders, _WARM_S)
        synced = []
        for _ in range(_TURNS):
            synced.append(fdatasync_rate(stack.folder, seconds / _TURNS))
            for load in loads:
                await load.turn(seconds / _TURNS)
        return Loads(sum(synced) / _TURNS, *loads)


@asynccontextmanager
async def _log(stack: Stack) -> AsyncIterator[Work]:
    """Appends at a sequencer in this process, beside the service's own: the log lets one write at a time."""
    identity = parse_identity(f"spiffe://{CONSORTIUM}/service/coordinator")
    database = Database(stack.postgres.config("audit_service"))
    await database.open()
    sequencer = Sequencer(PostgresStore(database), load_signing_key(stack.audit_key), SystemClock())
    writing = asyncio.create_task(sequencer.run())

    async def append(worker: int) -> None:
        await sequencer.append([make_leaf(read_event(_event(worker)), identity)])

    try:
        yield append
    finally:
        await end_tasks([writing])
        await database.close()


@dataclass(frozen=True)
class _Plain:
    target: str
    process: psutil.Process


@asynccontextmanager
async def _plain_service(stack: Stack) -> AsyncIterator[_Plain]:
    """The service of `services.bench.plain_inserts`; it ends with this process, however that ends."""
    with (stack.folder / "plain.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "services.bench.plain_inserts", str(stack.folder / "config" / "audit.yaml")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
        )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        port = (await process.stdout.readline()).strip()
        if not port:
            raise FedmeshError(Code.INTERNAL, f"the service to compare with did not start: see {log.name}")
        yield _Plain(f"127.0.0.1:{port.decode()}", psutil.Process(process.pid))
        process.stdin.close()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _stubs(opened: AsyncExitStack, stack: Stack, target: str, appenders: int) -> list[Any]:
    """A stub for each appender, over a connection of its own. All are in this process: what they cost is not the log's,
    and they make their calls without the retries of a service's client.
    """
    tls = stack.service_tls("coordinator")
    channels = [await opened.enter_async_context(MeshChannel(target, tls)) for _ in range(appenders)]
    return [channel.stub(audit_pb2_grpc.AuditServiceStub) for channel in channels]


def _calls(stubs: Sequence[Any], events: int) -> Work:
    async def append(worker: int) -> None:
        request = audit_pb2.AppendEventsRequest(request_id=new_id(), events=[_event(worker) for _ in range(events)])
        try:
            await stubs[worker].AppendEvents(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    return append


def _event(worker: int) -> audit_pb2.Event:
    at = Timestamp()
    at.GetCurrentTime()
    return audit_pb2.Event(
        event_id=new_id(),
        type="contribution.accepted",
        occurred_at=at,
        actor=f"spiffe://bench/hospital/h{worker:03d}",
        subject="job/bench",
        body_json=_BODY,
    )
