"""The task streams that this replica serves, over three connections to the store however many hospitals are connected.

One subscription hears of new tasks and of jobs to look at; one read fetches the new tasks of all hospitals that were
named; one heartbeat keeps all of them present. Nothing depends on a message being heard: streams are also read every
few seconds.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.tasks import end_tasks
from services.common.telemetry import get_logger
from services.coordinator import metrics
from services.coordinator.ports import Rounds

log = get_logger(__name__)

_POLL_S: Final = 2.0
_RETRY_S: Final = 0.2
# A hospital that does not read its stream for so many tasks is cut off; it comes back with its cursor.
_MOST_UNREAD: Final = 1000


@dataclass(frozen=True)
class Delivery:
    """A task and the cursor to go on from after it; None instead of the task in a heartbeat."""

    cursor: str
    task: bytes | None


@dataclass(eq=False)
class _Watcher:
    hospital_id: str
    details: str
    cursor: str
    queue: asyncio.Queue[Delivery] = field(default_factory=lambda: asyncio.Queue(_MOST_UNREAD))
    lost: bool = False


class Hub:
    """presence_s: how long a hospital counts as connected without a heartbeat. wake: told of jobs to look at."""

    def __init__(
        self,
        store: Rounds,
        clock: Clock,
        *,
        heartbeat_s: float,
        presence_s: float,
        wake: Callable[[str], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._presence_ms = int(presence_s * 1000)
        self._wake = wake
        self._watchers: set[_Watcher] = set()
        self._due: set[str] = set()
        self._work = asyncio.Event()
        self._away = False
        metrics.UNREAD.set_function(self._unread)

    def _unread(self) -> int:
        # Called by the thread that answers Prometheus: the copy is made in one step.
        return sum(watcher.queue.qsize() for watcher in tuple(self._watchers))

    # ---- for one hospital

    async def watch(self, hospital_id: str, cursor: str, fingerprint: str) -> AsyncIterator[Delivery]:
        """The hospital's tasks after a cursor, or at first its present ones; a heartbeat whenever nothing else comes.

        Raises: FedmeshError(STORE_UNAVAILABLE) at the beginning; (RATE_LIMITED) when the hospital does not read.
        """
        async with self._joined(hospital_id, cursor, fingerprint) as watcher:
            while True:
                if watcher.lost:
                    raise FedmeshError(Code.RATE_LIMITED, "tasks were not read for too long: connect again")
                yield await self._next(watcher)

    async def _next(self, watcher: _Watcher) -> Delivery:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the task.
        try:
            async with asyncio.timeout(self._heartbeat_s):
                return await watcher.queue.get()
        except TimeoutError:
            return Delivery(watcher.cursor, None)

    @asynccontextmanager
    async def _joined(self, hospital_id: str, cursor: str, fingerprint: str) -> AsyncIterator[_Watcher]:
        watcher = _Watcher(hospital_id, _details(self._clock.now(), fingerprint), cursor)
        await self._store.beat(self._presence_ms, {hospital_id: watcher.details})
        watcher.cursor, present = await self._store.watch(hospital_id, cursor)
        # Shows at once that the stream lives, before there is any task.
        watcher.queue.put_nowait(Delivery(watcher.cursor, None))
        for task in present:
            watcher.queue.put_nowait(Delivery(watcher.cursor, task))
        self._watchers.add(watcher)
        metrics.CONNECTED.set(len(self._watchers))
        metrics.HOSPITALS.labels(hospital_id).inc()
        self._look([hospital_id])
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            metrics.CONNECTED.set(len(self._watchers))
            metrics.HOSPITALS.labels(hospital_id).dec()
            await asyncio.shield(self._leave(watcher))

    async def _leave(self, watcher: _Watcher) -> None:
        try:
            await self._store.leave(watcher.hospital_id, watcher.details)
        except FedmeshError as error:
            log.info("presence_not_ended", hospital_id=watcher.hospital_id, reason=error.message)

    # ---- for all hospitals

    async def run(self) -> None:
        """Serve all streams until cancelled."""
        steps = {"listen": self._listen, "deliver": self._deliver, "heartbeat": self._beat}
        loops = [asyncio.create_task(_forever(name, step)) for name, step in steps.items()]
        try:
            await asyncio.gather(*loops)
        finally:
            await end_tasks(loops)

    def _look(self, hospital_ids: Iterable[str]) -> None:
        self._due.update(hospital_ids)
        self._work.set()

    async def _listen(self) -> None:
        async with aclosing(self._store.wake_ups()) as wake_ups:
            async for kind, names in wake_ups:
                if kind == "tasks":
                    self._look(names)
                    continue
                for job_id in names:
                    self._wake(job_id)

    async def _deliver(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._work.wait()
                due = self._due
            except TimeoutError:
                due = {watcher.hospital_id for watcher in self._watchers}
            self._work.clear()
            self._due = set()
            watchers = [watcher for watcher in self._watchers if watcher.hospital_id in due]
            try:
                if self._away:
                    await self._repeat()
                if watchers:
                    await self._fetch(watchers)
            except FedmeshError:
                self._away = True
                raise
            self._away = False

    async def _repeat(self) -> None:
        """Send everybody their present tasks once more: what answered them may have been lost with a master of Redis,
        and whoever sent it does not know. Doing a task again is harmless.
        """
        for watcher in tuple(self._watchers):
            watcher.cursor, present = await self._store.watch(watcher.hospital_id, "")
            for task in present:
                _put(watcher, Delivery(watcher.cursor, task))

    async def _fetch(self, watchers: list[_Watcher]) -> None:
        # Two streams of one hospital may stand at different cursors: read from the earlier one for both.
        cursors: dict[str, str] = {}
        for watcher in watchers:
            before = cursors.get(watcher.hospital_id, watcher.cursor)
            cursors[watcher.hospital_id] = min(before, watcher.cursor, key=_position)
        found = await self._store.read_tasks(cursors)
        for watcher in watchers:
            for cursor, task in found.get(watcher.hospital_id, ()):
                if _position(cursor) > _position(watcher.cursor):
                    watcher.cursor = cursor
                    _put(watcher, Delivery(cursor, task))

    async def _beat(self) -> None:
        while True:
            details = {watcher.hospital_id: watcher.details for watcher in self._watchers}
            if details:
                await self._store.beat(self._presence_ms, details)
            await asyncio.sleep(min(self._heartbeat_s, self._presence_ms / 3000))


def _put(watcher: _Watcher, delivery: Delivery) -> None:
    try:
        watcher.queue.put_nowait(delivery)
    except asyncio.QueueFull:
        watcher.lost = True


def _position(cursor: str) -> tuple[int, int]:
    milliseconds, _, sequence = cursor.partition("-")
    return int(milliseconds), int(sequence)


def _details(now: datetime, fingerprint: str) -> str:
    # The id tells two streams of one hospital apart.
    return json.dumps({"since_ms": int(now.timestamp() * 1000), "fingerprint": fingerprint, "id": new_id()})


async def _forever(name: str, step: Callable[[], Any]) -> None:
    """Run a loop again whenever Redis is back."""
    while True:
        try:
            await step()
        except FedmeshError as error:
            log.warning("redis_away", loop=name, reason=error.message)
            await asyncio.sleep(_RETRY_S)
