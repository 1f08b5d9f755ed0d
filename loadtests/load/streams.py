"""Hospitals that only wait: a connection and a task stream each."""

import asyncio
import heapq
import time
from typing import Final

from fedmesh.coordinator.v1 import coordinator_pb2

from loadtests.load.consortium import Clients, hospital_name
from services.common.errors import FedmeshError
from services.common.grpc.client import stream

# Streams that are opened at once: each begins with a TLS handshake, which costs both ends a millisecond or two.
_OPENING: Final = 20
_AGAIN_S: Final = 0.5


class Streams:
    """Streams by hospital; one that ends is opened again where it was."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._turns = asyncio.Semaphore(_OPENING)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._heard: set[str] = set()
        # The first numbers first: those are the founding hospitals.
        self._free: list[int] = []
        self._next = 1

    @property
    def heard(self) -> int:
        """How many have heard something."""
        return len(self._heard)

    async def open(self) -> tuple[str, float, str]:
        """The next hospital's stream: its id, milliseconds from its turn to its first word, and why it failed or ""."""
        number = heapq.heappop(self._free) if self._free else self._next
        self._next = max(self._next, number + 1)
        name, failed = hospital_name(number), ""
        async with self._turns:
            await self._clients.register(name)
            start, first = time.monotonic(), asyncio.get_running_loop().create_future()
            self._tasks[name] = asyncio.create_task(self._watch(name, first))
            try:
                await first
            except FedmeshError as error:
                failed = error.code.name
        return name, (time.monotonic() - start) * 1000, failed

    async def close(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._heard.discard(name)
        heapq.heappush(self._free, int(name.rsplit("-", 1)[1]))
        await self._clients.leave(name)

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(name) for name in list(self._tasks)))

    async def _watch(self, name: str, first: "asyncio.Future[None]") -> None:
        cursor = ""
        while True:
            try:
                coordinator = await self._clients.of(name, "coordinator")
                async for task in stream(coordinator.WatchTasks, coordinator_pb2.WatchTasksRequest(cursor=cursor)):
                    cursor = task.cursor
                    self._heard.add(name)
                    if not first.done():
                        first.set_result(None)
            except FedmeshError as error:
                if not first.done():
                    first.set_exception(error)
            await asyncio.sleep(_AGAIN_S)
