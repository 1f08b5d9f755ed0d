"""Gathers concurrent appends into batches, and writes one batch after another.

While a batch is being committed, whatever arrives waits and forms the next one: under load the cost of a commit is
shared by many events. Callers that were answered together come back one by one, as fast as this process can read their
calls; so a batch also waits for as many calls as there were last time, as long as they keep coming. One caller alone
waits for nobody. Several replicas may run a sequencer each; a lock in
the database lets one transaction at a time extend the log, so that indices are dense and there is only one history.

Nothing is told to a caller before the commit: a checkpoint that was signed in a transaction that failed is never seen.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from services.audit.domain.batch import Entry, Extension, Outcome, extend
from services.audit.domain.event import Leaf
from services.audit.ports import Head, Store, Transaction
from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span, get_logger
from services.transparency.checkpoint import Checkpoint, SigningKey, sign_checkpoint
from services.transparency.merkle import (
    EMPTY_ROOT,
    Coordinate,
    Frontier,
    frontier_nodes,
    inclusion_nodes,
    inclusion_proof,
)

log = get_logger(__name__)

# A batch costs some milliseconds of CPU however many calls are in it. It is given up waiting for more of them when none
# came for one step, and after so many steps. A step is as long as the last batch took, within bounds: where the machine
# is busy, callers take longer to come back too.
STEP_S: Final = 0.005
_LONGEST_STEP_S: Final = 0.02
_STEPS: Final = 5

_EVENTS: Final = Counter("fedmesh_audit_events_total", "Events answered, by outcome", ["outcome"])
_BATCH: Final = Histogram(
    "fedmesh_audit_batch_events", "Events in a batch", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
)
_SECONDS: Final = Histogram(
    "fedmesh_audit_batch_seconds",
    "Time to commit a batch",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
_QUEUED: Final = Gauge("fedmesh_audit_queued_events", "Events that wait for their batch")
_SIZE: Final = Gauge("fedmesh_audit_tree_size", "Entries in the log, as last seen by this replica")


@dataclass(frozen=True)
class Placed:
    """An entry and its inclusion proof in the tree of the checkpoint, leaf to root."""

    entry: Entry
    proof: list[bytes]


@dataclass(frozen=True)
class Appended:
    """A request's entries in its order, and a signed checkpoint that covers them."""

    placed: list[Placed]
    note: str


@dataclass(eq=False)
class _Waiting:
    leaves: Sequence[Leaf]
    answer: "asyncio.Future[Appended]"


@dataclass
class _Committed:
    """The state of the log after a batch."""

    head: Head
    outcomes: list[Outcome]
    hashes: dict[Coordinate, bytes] = field(repr=False)


class Sequencer:
    """The only writer of this process. `run` must be running for `append` to be answered."""

    def __init__(
        self,
        store: Store,
        key: SigningKey,
        clock: Clock,
        *,
        max_events: int = 1000,
        max_queued_events: int = 20_000,
        step_s: float = STEP_S,
    ) -> None:
        """step_s: how long a batch waits, at least, for one more of the calls that it expects."""
        self._store = store
        self._key = key
        self._clock = clock
        self._max_events = max_events
        self._max_queued = max_queued_events
        self._least_step_s = self._step_s = step_s
        self._queue: deque[_Waiting] = deque()
        self._queued = 0
        self._arrived = asyncio.Event()
        # Calls that were answered with the last batch, or waited then: those to be expected in the next one.
        self._expected = 0
        self._complete = asyncio.Event()

    async def append(self, leaves: Sequence[Leaf]) -> Appended:
        """Append the events of one request, all or none, and wait until they are durable.

        The events of a caller that gives up may or may not be written; asking again with the same ids is safe.

        Raises: FedmeshError(REQUEST_ID_REUSED) when an event id stands for another event, (RATE_LIMITED) when too much
            waits already, (STORE_UNAVAILABLE | STORE_FULL) when the database is away or full, (WRONG_STATE) when the
            stored tree contradicts its checkpoint.
        """
        if self._queued + len(leaves) > self._max_queued:
            raise FedmeshError(Code.RATE_LIMITED, "too many events wait for the log: try again")
        waiting = _Waiting(leaves, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._count(len(leaves))
        self._arrived.set()
        if self._is_complete():
            self._complete.set()
        return await waiting.answer

    async def run(self) -> None:
        """Write batches until cancelled. Nothing that the database does ends this loop."""
        try:
            while True:
                await self._arrived.wait()
                await self._gather()
                if batch := self._take():
                    began = time.monotonic()
                    await self._write(batch)
                    self._expected = len(batch) + len(self._queue)
                    self._step_s = max(self._least_step_s, min(time.monotonic() - began, _LONGEST_STEP_S))
                else:
                    self._arrived.clear()
        finally:
            for waiting in self._queue:
                _refuse(waiting, FedmeshError(Code.SERVICE_UNAVAILABLE, "the audit service is stopping: try again"))

    async def _gather(self) -> None:
        """Wait for the calls to be expected, as long as they keep coming."""
        for _ in range(_STEPS):
            before = len(self._queue)
            if self._is_complete() or not before:
                return
            self._complete.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._step_s):
                    await self._complete.wait()
            if len(self._queue) == before:
                return

    def _is_complete(self) -> bool:
        return len(self._queue) >= self._expected or self._queued >= self._max_events

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        events = 0
        while self._queue and (not batch or events + len(self._queue[0].leaves) <= self._max_events):
            waiting = self._queue.popleft()
            self._count(-len(waiting.leaves))
            # During an outage callers give up and come again: their old calls would only pile up.
            if not waiting.answer.done():
                batch.append(waiting)
                events += len(waiting.leaves)
        return batch

    def _count(self, change: int) -> None:
        self._queued += change
        _QUEUED.set(self._queued)

    async def _write(self, batch: list[_Waiting]) -> None:
        requests = [waiting.leaves for waiting in batch]
        try:
            with _SECONDS.time(), _attempt_spans(requests):
                committed = await self._store.run("append", lambda tx: self._extend(tx, requests), appends=True)
        except asyncio.CancelledError:
            for waiting in batch:
                _refuse(waiting, FedmeshError(Code.SERVICE_UNAVAILABLE, "the audit service is stopping: try again"))
            raise
        except Exception as error:
            # Whoever waits must hear of it, and those who come later must still be served.
            if isinstance(error, FedmeshError):
                log.warning("batch_failed", requests=len(batch), code=error.code.value, reason=error.message)
            else:
                log.error("batch_failed", requests=len(batch), exc_info=error)
            _EVENTS.labels("failed").inc(sum(map(len, requests)))
            for waiting in batch:
                _refuse(waiting, error)
            return
        _BATCH.observe(sum(map(len, requests)))
        _SIZE.set(committed.head.size)
        shared: dict[tuple[int, int], bytes] = {}
        for waiting, outcome in zip(batch, committed.outcomes, strict=True):
            _answer(waiting, outcome, committed, shared)

    async def _extend(self, tx: Transaction, requests: Sequence[Sequence[Leaf]]) -> _Committed:
        found = await tx.begin_append([leaf.event_id for leaves in requests for leaf in leaves])
        head = found.head or empty_head(self._key)
        frontier = Frontier(head.size, [found.edge[place] for place in frontier_nodes(head.size)])
        require_root(frontier.root(), head)
        extension = extend(frontier, found.known, requests)
        hashes = await _proof_hashes(tx, found.edge, extension, frontier.size)
        if extension.entries:
            if frontier.size > found.room:
                await tx.make_room(frontier.size)
            head = await self._sign(tx, extension, frontier)
        return _Committed(head, extension.outcomes, hashes)

    async def _sign(self, tx: Transaction, extension: Extension, frontier: Frontier) -> Head:
        checkpoint = Checkpoint(self._key.name, frontier.size, frontier.root())
        note = sign_checkpoint(checkpoint, self._key)
        await tx.extend(extension, checkpoint, note, self._clock.now())
        return Head(checkpoint.size, checkpoint.root, note)


def _attempt_spans(requests: Sequence[Sequence[Leaf]]) -> ExitStack:
    """A span in the trace of every round that a batch tells of: one for all events of an attempt."""
    with ExitStack() as spans:
        for attempt in sorted({leaf.attempt for leaves in requests for leaf in leaves if leaf.attempt is not None}):
            spans.enter_context(attempt_span("audit.append", *attempt))
        return spans.pop_all()


def empty_head(key: SigningKey) -> Head:
    """The checkpoint of a log without entries; it is signed when asked for, and stored nowhere."""
    return Head(0, EMPTY_ROOT, sign_checkpoint(Checkpoint(key.name, 0, EMPTY_ROOT), key))


def require_root(root: bytes, head: Head) -> None:
    """Never sign on top of a tree that is not the one that was signed last.

    Raises: FedmeshError(WRONG_STATE).
    """
    if root != head.root:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the stored tree of {head.size} entries contradicts its checkpoint: the database was changed by hand",
        )


async def _proof_hashes(
    tx: Transaction, edge: dict[Coordinate, bytes], extension: Extension, size: int
) -> dict[Coordinate, bytes]:
    """All hashes for the proofs of a batch. Those of new entries need only the old edge and the new hashes."""
    hashes = edge | extension.hashes()
    fresh = {entry.index for entry in extension.entries}
    repeated = {
        entry.index
        for outcome in extension.outcomes
        if not isinstance(outcome, FedmeshError)
        for entry in outcome
        if entry.index not in fresh
    }
    missing = {place for index in repeated for place in inclusion_nodes(index, size)} - hashes.keys()
    if missing:
        hashes |= await tx.hashes(missing)
    _EVENTS.labels("new").inc(len(fresh))
    _EVENTS.labels("known").inc(len(repeated))
    return hashes


def _answer(waiting: _Waiting, outcome: Outcome, committed: _Committed, shared: dict[tuple[int, int], bytes]) -> None:
    """shared: what the proofs of a batch have in common, which is most of them."""
    if isinstance(outcome, FedmeshError):
        _EVENTS.labels("refused").inc(len(waiting.leaves))
        _refuse(waiting, outcome)
    elif not waiting.answer.done():
        size, hashes = committed.head.size, committed.hashes

        def node(level: int, position: int) -> bytes:
            return hashes[Coordinate(level, position)]

        placed = [Placed(entry, inclusion_proof(entry.index, size, node, shared)) for entry in outcome]
        waiting.answer.set_result(Appended(placed, committed.head.note))


def _refuse(waiting: _Waiting, error: Exception) -> None:
    # A caller whose deadline passed has cancelled its future.
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
