"""Makes the calls that Locust's users ask for, with fedmesh's own clients, and keeps every sample."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fedmesh.coordinator.v1 import coordinator_pb2

from loadtests.chaos.calls import OPERATOR, Known
from loadtests.load.consortium import PATIENCE_S, Clients
from loadtests.load.figures import Scenario, Usage
from loadtests.load.settings import Sample
from loadtests.load.storms import Call, audit, control
from loadtests.load.streams import Streams
from loadtests.load.uploads import Uploads
from loadtests.peers.settings import Tell
from services.bench.usage import cpu_seconds, families
from services.common.errors import TABLE, Code, FedmeshError
from services.common.grpc.client import call
from services.embedded.stack import Stack

_SETTLE_TIMEOUT_S: Final = 90.0


class Driver:
    """What Locust may ask for, by name. params: integers of an upload where nobody prepared any."""

    def __init__(self, stack: Stack, clients: Clients, known: Known, params: int, tell: Tell) -> None:
        self._stack, self._clients, self._tell = stack, clients, tell
        self._streams = Streams(clients)
        self._uploads = Uploads(clients, params)
        self._following: dict[str, Callable[[], tuple[str, Call]]] = {
            "ControlPlane": control(clients, known),
            "AuditStorm": audit(clients, known),
        }
        self._meter: Meter | None = None
        self.scenarios: list[Scenario] = []

    async def answer(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Raises: FedmeshError: what was asked for is not there or cannot be had; failed calls are answers."""
        if what in self._following:
            return await self._make(*self._following[what](), asked["due"])
        match what:
            case "UploadStorm":
                asked_at = time.monotonic()
                name, make = await self._uploads.following()
                # That no upload is ready is the load's fault and not the stack's.
                return await self._make(name, make, asked["due"] + time.monotonic() - asked_at)
            case "watch":
                hospital, ms, failed = await self._streams.open()
                return {"hospital": hospital, "name": "coordinator.WatchTasks", "ms": ms, "bytes": 0, "failed": failed}
            case "leave":
                await self._streams.close(asked["hospital"])
            case "settle":
                await self._settle(asked["waiting"])
            case "prepare":
                await self._uploads.prepare(asked["params"], asked["sums"])
            case "begin":
                await self._begin(asked["step"])
            case "end":
                self._end()
            case _:
                raise FedmeshError(Code.INVALID_ARGUMENT, f"nobody knows how to {what}")
        return {}

    async def close(self) -> None:
        self._uploads.close()
        await self._streams.close_all()

    async def _settle(self, waiting: int) -> None:
        """Until so many hospitals wait, as the coordinator sees it."""
        self._tell(f"{waiting} hospitals on the task stream")
        try:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                while self._streams.heard < waiting or await self._connected() < waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE, f"{self._streams.heard} of {waiting} hospitals connected"
            ) from None

    async def _connected(self) -> int:
        coordinator = await self._clients.of(OPERATOR, "coordinator")
        request = coordinator_pb2.ListParticipantsRequest()
        return len((await call(coordinator.ListParticipants, request, patience_s=PATIENCE_S)).participants)

    async def _begin(self, step: dict[str, Any]) -> None:
        beside = f", {step['rate']:.3g} calls a second" if step["user"] else ""
        self._tell(f"{step['name']}: {step['seconds']:g} s{beside}")
        self.scenarios.append(Scenario(step["name"], await self._connected(), step["seconds"]))
        self._meter = Meter(self._stack)

    def _end(self) -> None:
        if self._meter is None:
            raise FedmeshError(Code.INVALID_ARGUMENT, "no scenario has begun")
        found, self._meter = self._meter, None
        self.scenarios[-1].seconds, self.scenarios[-1].usage = found.read()

    async def _make(self, name: str, make: Call, due: float) -> dict[str, Any]:
        """A call. due: of the machine's monotonic clock, which both processes read; latency has all retries in it."""
        status, size = "OK", 0
        try:
            size = await make()
        except FedmeshError as error:
            status = TABLE[error.code].status.name
        ms = (time.monotonic() - due) * 1000
        scenario = self.scenarios[-1].name if self._meter is not None else ""
        sample = Sample(scenario, name, ms, status, size)
        if self._meter is not None:
            self.scenarios[-1].samples.append(sample)
        # Who asks for a sum that is not there is told so: an answer, and no failure.
        failed = status if sample.failed else ""
        return {"name": f"{scenario} {name}".strip(), "ms": ms, "bytes": size, "failed": failed}


async def serve(driver: Driver, path: Path) -> asyncio.Server:
    """Listen at a Unix socket. A line is a question in JSON, and so is its answer, whenever it is there."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        under_way: set[asyncio.Task[None]] = set()
        async for line in reader:
            task = asyncio.create_task(_answer(driver, json.loads(line), writer))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        for task in under_way:
            task.cancel()
        writer.close()

    return await asyncio.start_unix_server(connected, path)


async def _answer(driver: Driver, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    try:
        found = await driver.answer(asked["what"], asked)
    except FedmeshError as error:
        found = {"error": error.message}
    except Exception as error:  # whatever it was, whoever waits for an answer must hear of it
        found = {"error": repr(error)}
    writer.write(json.dumps({"number": asked["number"], **found}).encode() + b"\n")
    await writer.drain()


class Meter:
    """Processor time and memory of the services and the stores, from one moment on."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._before, self._start = stack, cpu_seconds(stack), time.monotonic()

    def read(self) -> tuple[float, dict[str, Usage]]:
        """Seconds since then, and what each part used in them."""
        after, seconds, found = cpu_seconds(self._stack), time.monotonic() - self._start, {}
        for name, family in families(self._stack).items():
            memory = sum(process.memory_info().rss for process in family if process.is_running())
            found[name] = Usage((after[name] - self._before[name]) / seconds, memory / 2**20)
        return seconds, found
