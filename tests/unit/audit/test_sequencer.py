"""How appends are gathered into batches, on a log in memory."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.audit.domain.batch import Extension
from services.audit.domain.event import Leaf
from services.audit.ports import Beginning, Head
from services.audit.sequencer import Appended, Sequencer
from services.common.clock import SystemClock
from services.transparency.checkpoint import SigningKey
from services.transparency.merkle import Coordinate, frontier_nodes

# Longer than any test may take: who waits for it by mistake is seen.
NEVER_S = 3600.0


class MemoryLog:
    """A `Store` of one log; it counts the events of every batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self._head: Head | None = None
        self._hashes: dict[Coordinate, bytes] = {}

    async def run(self, name: str, body: Callable[[Any], Awaitable[Any]], *, appends: bool = False) -> Any:
        assert (name, appends) == ("append", True)
        return await body(self)

    async def begin_append(self, event_ids: list[uuid.UUID]) -> Beginning:
        self.batches.append(len(event_ids))
        size = 0 if self._head is None else self._head.size
        return Beginning(self._head, {place: self._hashes[place] for place in frontier_nodes(size)}, {}, 2**22)

    async def extend(self, extension: Extension, checkpoint: Any, note: str, _at: object) -> None:
        self._hashes |= extension.hashes()
        self._head = Head(checkpoint.size, checkpoint.root, note)


@asynccontextmanager
async def running(log: MemoryLog, step_s: float, **limits: int) -> AsyncIterator[Sequencer]:
    key = SigningKey("consortium.test/audit", Ed25519PrivateKey.generate())
    sequencer = Sequencer(log, key, SystemClock(), step_s=step_s, **limits)
    writing = asyncio.create_task(sequencer.run())
    try:
        async with asyncio.timeout(120):
            yield sequencer
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


def leaf() -> list[Leaf]:
    event_id = uuid.uuid4()
    return [Leaf(event_id, event_id.bytes)]


async def one_by_one(sequencer: Sequencer, number: int) -> list[Appended]:
    """Appends that are begun one after another, each when the one before waits already."""
    begun = []
    for _ in range(number):
        begun.append(asyncio.create_task(sequencer.append(leaf())))
        for _ in range(10):
            await asyncio.sleep(0)
    return await asyncio.gather(*begun)


async def test_callers_of_a_batch_are_waited_for_in_the_next() -> None:
    log = MemoryLog()
    async with running(log, NEVER_S) as sequencer:
        await asyncio.gather(*(sequencer.append(leaf()) for _ in range(5)))
        appended = await one_by_one(sequencer, 5)
    assert log.batches == [5, 5]
    assert sorted(one.placed[0].entry.index for one in appended) == [5, 6, 7, 8, 9]
    assert len({one.note for one in appended}) == 1


async def test_a_caller_alone_waits_for_nobody() -> None:
    log = MemoryLog()
    async with running(log, NEVER_S) as sequencer:
        for _ in range(3):
            await sequencer.append(leaf())
    assert log.batches == [1, 1, 1]


async def test_who_does_not_come_back_is_waited_for_once() -> None:
    log = MemoryLog()
    async with running(log, 0.001) as sequencer:
        await asyncio.gather(*(sequencer.append(leaf()) for _ in range(5)))
        for _ in range(3):
            await sequencer.append(leaf())
    assert log.batches == [5, 1, 1, 1]


@pytest.mark.parametrize("most", [2, 3])
async def test_a_full_batch_waits_for_nobody(most: int) -> None:
    log = MemoryLog()
    async with running(log, NEVER_S, max_events=most) as sequencer:
        await asyncio.gather(*(sequencer.append(leaf()) for _ in range(6)))
        await one_by_one(sequencer, 3 * most)
    assert set(log.batches) == {most}


async def test_what_is_gathered_is_told_when_the_service_stops() -> None:
    log = MemoryLog()
    async with running(log, NEVER_S) as sequencer:
        await asyncio.gather(*(sequencer.append(leaf()) for _ in range(2)))
        left = asyncio.create_task(sequencer.append(leaf()))
        for _ in range(10):
            await asyncio.sleep(0)
    with pytest.raises(Exception, match="stopping"):
        await left
    assert log.batches == [2]
