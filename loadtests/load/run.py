"""One run: the stack, growing numbers of idle hospitals with calls beside them, and the storms."""

import asyncio
import json
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Final

from fedmesh.coordinator.v1 import coordinator_pb2

from loadtests.chaos.calls import OPERATOR
from loadtests.chaos.schedule import arrivals
from loadtests.load.consortium import SETTINGS, Clients, begin, member_names
from loadtests.load.figures import AUDIT_STORM, CONTROL, IDLE, UPLOAD_STORM, Scenario, Usage
from loadtests.load.settings import MEMBERS, Options, Sample
from loadtests.load.storms import Call, Uploads, audit, control
from loadtests.peers.settings import Tell
from services.bench.usage import cpu_seconds, families
from services.common.errors import TABLE, Code, FedmeshError
from services.common.grpc.client import call, stream
from services.embedded.guard import Guard
from services.embedded.stack import Stack
from tests.support.aggregation import Attempt

# Streams that are opened at once: each begins with a TLS handshake, which costs both ends a millisecond or two.
_OPENING: Final = 20
_CONNECT_TIMEOUT_S: Final = 90.0
_FILES: Final = 8192


class Run:
    """What is under way in one run. locust: standard input of `locust_report`."""

    def __init__(self, options: Options, stack: Stack, clients: Clients, locust: IO[bytes], tell: Tell) -> None:
        self._options, self._stack, self._clients = options, stack, clients
        self._locust, self._tell = locust, tell
        self._streams: list[asyncio.Task[None]] = []
        self._heard: set[str] = set()

    async def scenarios(self, hospitals: list[str]) -> list[Scenario]:
        """All of them. Raises: FedmeshError when the stack cannot be set up or a hospital cannot connect."""
        options = self._options
        self._tell(f"registering {len(hospitals)} hospitals")
        known = await begin(self._stack, self._clients, hospitals, options)
        done = []
        try:
            for count in sorted(options.hospitals):
                await self._wait_idle(hospitals[:count])
                if count in (min(options.hospitals), max(options.hospitals)):
                    done.append(await self._rest(f"{IDLE}-{count}"))
                done.append(await self._measure(f"{CONTROL}-{count}", options.rate, control(self._clients, known)))
            done.append(await self._measure(AUDIT_STORM, options.events, audit(self._clients, known)))
            done.extend([await self._upload(params) for params in sorted(options.params)])
        finally:
            for task in self._streams:
                task.cancel()
            await asyncio.gather(*self._streams, return_exceptions=True)
        return done

    async def _upload(self, params: int) -> Scenario:
        """An upload storm; of larger models fewer a second, so that the bytes are about the same."""
        made = await asyncio.to_thread(Attempt.of, _NO_CENTRE, MEMBERS, params)
        uploads = await asyncio.to_thread(Uploads, self._clients, made)
        await uploads.open()
        rate = max(1.0, self._options.uploads * min(self._options.params) / params)
        return await self._measure(f"{UPLOAD_STORM}-{params}", rate, uploads.following)

    async def _rest(self, name: str) -> Scenario:
        """What the stack uses while hospitals only wait."""
        self._tell(f"{name}: {self._options.seconds:g} s")
        found = Scenario(name, await self._connected(), self._options.seconds)
        meter = Meter(self._stack)
        await asyncio.sleep(self._options.seconds)
        found.usage = meter.read(found.seconds)
        return found

    async def _wait_idle(self, names: list[str]) -> None:
        """Let these hospitals, and those before, wait on the task stream; until each has heard something."""
        self._tell(f"{len(names)} hospitals on the task stream")
        turns = asyncio.Semaphore(_OPENING)
        fresh = names[len(self._streams) :]
        self._streams += [asyncio.create_task(self._watch(name, turns)) for name in fresh]
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                while not self._heard.issuperset(names):  # noqa: ASYNC110 - the coordinator decides
                    await asyncio.sleep(0.1)
        except TimeoutError:
            missing = sorted(set(names) - self._heard)
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE, f"{len(missing)} hospitals did not connect, {missing[0]} among them"
            ) from None

    async def _watch(self, name: str, turns: asyncio.Semaphore) -> None:
        cursor = ""
        while True:
            with suppress(FedmeshError):
                async with turns:
                    coordinator = await self._clients.of(name, "coordinator")
                    tasks = stream(coordinator.WatchTasks, coordinator_pb2.WatchTasksRequest(cursor=cursor))
                    cursor = (await anext(tasks)).cursor
                self._heard.add(name)
                async for task in tasks:
                    cursor = task.cursor
            await asyncio.sleep(0.5)

    async def _connected(self) -> int:
        coordinator = await self._clients.of(OPERATOR, "coordinator")
        answer = await call(coordinator.ListParticipants, coordinator_pb2.ListParticipantsRequest(), patience_s=30)
        return len(answer.participants)

    async def _measure(self, name: str, rate: float, following: Callable[[], tuple[str, Call]]) -> Scenario:
        """Calls in an open loop; latency counts from when a call was due, its retries included."""
        self._tell(f"{name}: {rate:g} calls a second for {self._options.seconds:g} s")
        found = Scenario(name, await self._connected(), self._options.seconds)
        meter, loop = Meter(self._stack), asyncio.get_running_loop()
        start = loop.time()
        under_way = []
        for due in arrivals(rate, seed=1):
            if due > self._options.seconds:
                break
            await asyncio.sleep(max(0.0, start + due - loop.time()))
            under_way.append(loop.create_task(self._make(found, *following(), start + due)))
        await asyncio.gather(*under_way)
        found.seconds = loop.time() - start
        found.usage = meter.read(found.seconds)
        return found

    async def _make(self, found: Scenario, name: str, make: Call, due: float) -> None:
        status, size = "OK", 0
        try:
            size = await make()
        except FedmeshError as error:
            status = TABLE[error.code].status.name
        ms = (asyncio.get_running_loop().time() - due) * 1000
        sample = Sample(found.name, name, ms, status, size)
        found.samples.append(sample)
        # Who asks for a sum that is not there is told so: an answer, and no failure.
        failed = status if sample.failed else ""
        line = json.dumps([f"{found.name} {name}", round(ms, 2), size, failed]) + "\n"
        self._locust.write(line.encode())


# An attempt's hospitals are all that is wanted of it: its calls are made here, with certificates of this stack.
_NO_CENTRE: Final[Any] = SimpleNamespace()


def run_load(options: Options, locust: Path, tell: Tell) -> list[Scenario]:
    """Start a stack, load it, and leave nothing running. locust: the Python that has it.

    Raises: FedmeshError: a part did not start, or hospitals could not connect.
    """
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    _allow_files()
    guard = Guard()
    stack = Stack(options.folder, guard=guard, settings=SETTINGS)
    reader = subprocess.Popen(  # noqa: S603 - our own environment
        [locust, Path(__file__).with_name("locust_report.py")], stdin=subprocess.PIPE
    )
    assert reader.stdin is not None
    try:
        tell("starting the stack")
        stack.start()
        stack.found(member_names())
        return asyncio.run(_scenarios(options, stack, reader.stdin, tell))
    finally:
        reader.stdin.close()
        reader.wait(30)
        stack.stop()
        guard.close()


async def _scenarios(options: Options, stack: Stack, locust: IO[bytes], tell: Tell) -> list[Scenario]:
    idle = max(options.hospitals) - MEMBERS
    hospitals = member_names() + [f"idle-{number:04d}" for number in range(1, idle + 1)]
    async with AsyncExitStack() as closing:
        clients = Clients(stack, hospitals, closing)
        return await Run(options, stack, clients, locust, tell).scenarios(hospitals)


def _allow_files() -> None:
    """Every hospital is a connection here and another in the coordinator, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Meter:
    """Processor time and memory of the services and the stores, from one moment on."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._before = stack, cpu_seconds(stack)

    def read(self, seconds: float) -> dict[str, Usage]:
        """What each part used since then, `seconds` ago."""
        after, found = cpu_seconds(self._stack), {}
        for name, family in families(self._stack).items():
            memory = sum(process.memory_info().rss for process in family if process.is_running())
            found[name] = Usage((after[name] - self._before[name]) / seconds, memory / 2**20)
        return found


def stamp() -> str:
    """Now, for a report."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
