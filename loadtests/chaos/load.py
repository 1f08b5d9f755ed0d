"""The load's process: `python -m loadtests.chaos.load --config FILE`. Open loop until SIGTERM, then what is under way.

It writes every call to `calls.jsonl`, every acknowledged change to `acknowledged.jsonl` and every committed round that
it saw to `rounds.jsonl`, and creates a job when there is none that runs.
"""

import argparse
import asyncio
import json
import signal
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

import uvloop
from fedmesh.audit.v1 import audit_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import registry_pb2

from loadtests.chaos.calls import HOSPITAL, KINDS, STUBS, Kind, Known, plan_document
from loadtests.chaos.records import Appender
from loadtests.chaos.schedule import arrivals, mixture
from services.common.config import TlsConfig
from services.common.errors import TABLE, FedmeshError
from services.common.grpc.client import DEFAULT_TIMEOUT_S, MeshChannel, call, stream
from services.common.ids import new_id

# The standard client's patience: longer than the longest planned outage of a store, 30 s.
PATIENCE_S: Final = 45.0
# Calls that wait at once before more are turned away here, and counted as failed: the machine is not to suffocate.
MOST_WAITING: Final = 10_000
HEARTBEAT_TIMEOUT_S: Final = 20.0
LOOK_S: Final = 0.5


class Clients:
    """Channels by caller and service; each hospital has its own."""

    def __init__(self, config: dict[str, Any], stack: AsyncExitStack) -> None:
        self._targets = config["targets"]
        self._tls = {name: [TlsConfig.model_validate(item) for item in found] for name, found in config["tls"].items()}
        self._stack = stack
        self._stubs: dict[tuple[str, int, str], Any] = {}
        self._turns: dict[str, int] = {}

    async def stub(self, caller: str, service: str) -> Any:
        """A stub of the next caller of its kind."""
        turn = self._turns[caller] = (self._turns.get(caller, -1) + 1) % len(self._tls[caller])
        return await self.of(caller, turn, service)

    async def of(self, caller: str, number: int, service: str) -> Any:
        key = (caller, number, service)
        if key not in self._stubs:
            channel = MeshChannel(self._targets[service], self._tls[caller][number])
            await self._stack.enter_async_context(channel)
            self._stubs[key] = channel.stub(STUBS[service])
        return self._stubs[key]

    def count(self, caller: str) -> int:
        return len(self._tls[caller])


class Load:
    """The open loop and its observers."""

    def __init__(self, config: dict[str, Any], clients: Clients) -> None:
        self._config = config
        self._clients = clients
        truth = Path(config["truth"])
        self._calls = Appender(truth / "calls.jsonl")
        self._acknowledged = Appender(truth / "acknowledged.jsonl")
        self._rounds = Appender(truth / "rounds.jsonl")
        self._jobs = Appender(truth / "jobs.jsonl")
        self._known = Known(config["job_id"], plan_document(config["manifest"].encode()))
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        observers = [loop.create_task(work) for work in self._observers()]
        offset, start = time.time() - loop.time(), loop.time()
        kinds = mixture({name: kind.weight for name, kind in KINDS.items()}, seed=2)
        for due in arrivals(self._config["rate"], seed=1):
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, start + due - loop.time())):
                    await stop.wait()
            if stop.is_set():
                break
            name = next(kinds)
            if len(self._under_way) >= MOST_WAITING:
                self._calls.add(round(start + due + offset, 4), 0.0, name, "RESOURCE_EXHAUSTED")
                continue
            task = loop.create_task(self._make(name, start + due, offset))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.gather(*self._under_way)
        for task in observers:
            task.cancel()
        await asyncio.gather(*observers, return_exceptions=True)

    def _observers(self) -> list[Any]:
        hospitals = [self._watch(number) for number in range(self._clients.count(HOSPITAL))]
        return [self._follow_rounds(), self._keep_a_job(), *hospitals]

    async def _make(self, name: str, due: float, offset: float) -> None:
        kind = KINDS[name]
        request = kind.make(self._known)
        stub = await self._clients.stub(kind.caller, kind.service)
        status = "OK"
        try:
            response = await call(
                getattr(stub, kind.method), request, timeout_s=DEFAULT_TIMEOUT_S, patience_s=PATIENCE_S
            )
        except FedmeshError as error:
            status = TABLE[error.code].status.name
        else:
            self._learn(kind, request, response)
        latency = asyncio.get_running_loop().time() - due
        self._calls.add(round(due + offset, 4), round(latency * 1000, 2), name, status)

    def _learn(self, kind: Kind, request: Any, response: Any) -> None:
        promised = kind.acknowledged(request, response)
        if promised is not None:
            self._acknowledged.add(time.time(), *promised)
        if isinstance(response, audit_pb2.GetCheckpointResponse):
            # The second line of a checkpoint is the log's size.
            self._known.log_size = int(response.checkpoint.splitlines()[1])

    async def _follow_rounds(self) -> None:
        """Note every round that the registry says is committed."""
        registry = await self._clients.of("operator", 0, "registry")
        while True:
            request = registry_pb2.ListRoundsRequest(job_id=self._known.job_id, after_version=self._known.version)
            with suppress(FedmeshError):
                for done in (await call(registry.ListRounds, request)).rounds:
                    self._known.version = done.version
                    contributions = {item.hospital_id: item.ciphertext_sha256 for item in done.contributions}
                    facts = (done.attempt.attempt, done.sum_sha256, done.burnt, contributions)
                    self._rounds.add(time.time(), self._known.job_id, done.version, *facts)
            await asyncio.sleep(LOOK_S)

    async def _keep_a_job(self) -> None:
        """Start another job when the one before has ended; how it ended is noted."""
        registry = await self._clients.of("operator", 0, "registry")
        while True:
            await asyncio.sleep(2 * LOOK_S)
            with suppress(FedmeshError):
                job = (await call(registry.GetJob, registry_pb2.GetJobRequest(job_id=self._known.job_id))).job
                if job.status == registry_pb2.JOB_STATUS_RUNNING or self._known.version < job.version:
                    continue
                self._jobs.add(time.time(), job.job_id, registry_pb2.JobStatus.Name(job.status), job.reason)
                request = registry_pb2.CreateJobRequest(
                    request_id=new_id(), plan_id=job.plan_id, hospital_ids=job.hospital_ids
                )
                self._known.job_id = (await call(registry.CreateJob, request, patience_s=30)).job.job_id
                self._known.version = 0

    async def _watch(self, number: int) -> None:
        """An idle hospital's task stream, opened anew when it ends or falls silent, as a node does."""
        coordinator = await self._clients.of(HOSPITAL, number, "coordinator")
        cursor = ""
        await asyncio.sleep(number * 0.02)
        while True:
            request = coordinator_pb2.WatchTasksRequest(cursor=cursor)
            responses = stream(coordinator.WatchTasks, request)
            with suppress(FedmeshError, StopAsyncIteration, TimeoutError):
                while True:
                    async with asyncio.timeout(HEARTBEAT_TIMEOUT_S):
                        cursor = (await anext(responses)).cursor
            with suppress(FedmeshError):
                await responses.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(self._known.chance.uniform(0.1, 2.0))


async def run(config: dict[str, Any]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await Load(config, Clients(config, stack)).run(stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    uvloop.run(run(json.loads(parser.parse_args().config.read_text())))
