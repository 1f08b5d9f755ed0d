"""Which task to do next: the newest of each job, jobs side by side."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from services.hospital_node.domain.tasks import Task

_BETWEEN_CURSORS_S: Final = 0.5


@dataclass
class _Entry:
    """A task that came, with the cursor that it came under."""

    cursor: str
    done: bool = False


@dataclass
class _Lane:
    """One job: at most one task under way and one waiting."""

    newest: Task
    running: asyncio.Task[None] | None = None
    task: Task | None = None
    entry: _Entry | None = None
    waiting: tuple[Task, _Entry] | None = None


@dataclass
class Inbox:
    """Runs `perform` for tasks as they come.

    A newer task of a job stops the one under way, whose phase is over, and replaces the one waiting; a repetition of
    the one under way is dropped; an older one is dropped. `perform` must not raise and must stand being cancelled.

    save: told the cursor up to which every task is done, so that a restarted node is told the others again.
    """

    perform: Callable[[Task], Awaitable[None]]
    save: Callable[[str], Awaitable[None]]
    _lanes: dict[str, _Lane] = field(default_factory=dict)
    _entries: deque[_Entry] = field(default_factory=deque)
    _saved: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, cursor: str, task: Task) -> None:
        entry = _Entry(cursor)
        self._entries.append(entry)
        lane = self._lanes.setdefault(task.attempt.job_id, _Lane(task))
        if task.rank < lane.newest.rank or task in (lane.task, lane.waiting and lane.waiting[0]):
            self._finish(entry)
            return
        lane.newest = task
        if lane.waiting is not None:
            self._finish(lane.waiting[1])
        lane.waiting = (task, entry)
        if lane.running is None:
            self._start(lane)
        else:
            lane.running.cancel()

    async def save_cursors(self) -> None:
        """Save the cursor when it has moved, now and then: an old one only repeats tasks. Runs until cancelled."""
        while True:
            await self._saved.wait()
            self._saved.clear()
            cursor = ""
            while self._entries and self._entries[0].done:
                cursor = self._entries.popleft().cursor
            if cursor:
                await self.save(cursor)
                await asyncio.sleep(_BETWEEN_CURSORS_S)

    async def close(self) -> None:
        """Stop everything under way."""
        running = [lane.running for lane in self._lanes.values() if lane.running is not None]
        for lane in self._lanes.values():
            lane.waiting = None
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, lane: _Lane) -> None:
        if lane.waiting is None:
            return
        (lane.task, lane.entry), lane.waiting = lane.waiting, None
        lane.running = asyncio.ensure_future(self.perform(lane.task))
        lane.running.add_done_callback(lambda _future: self._ended(lane))

    def _ended(self, lane: _Lane) -> None:
        if lane.entry is not None:
            self._finish(lane.entry)
        lane.running, lane.task, lane.entry = None, None, None
        self._start(lane)

    def _finish(self, entry: _Entry) -> None:
        entry.done = True
        self._saved.set()
