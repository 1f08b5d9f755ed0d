"""Adds uploads to sums in batches: what arrives while one batch is being added becomes the next.

A batch costs one read and one write of the accumulator and one switch of the record, however many uploads are in it.
Another replica may add to the same sum at the same time: the record is switched by compare-and-set, and whoever comes
second adds its batch to the winner's accumulator again.
"""

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from services.aggregator.addition import Addition, add_batch, parse_addition
from services.aggregator.domain.sums import AttemptId, Blob, Form, Sum, not_open
from services.aggregator.store.redis import RedisSums
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.telemetry import attempt_span
from services.secure_sum.disposable import DisposablePool

_MOST_CONFLICTS: Final = 32


class Counted(NamedTuple):
    """contributors: how many are in the sum now. already: these bytes were in it before."""

    contributors: int
    already: bool


@dataclass(eq=False)
class _Item:
    hospital_id: str
    sha256: str
    content: bytes
    done: asyncio.Future[Counted] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Combiner:
    """batch: most uploads added in one step."""

    def __init__(self, store: RedisSums, pool: DisposablePool, batch: int) -> None:
        self._store = store
        self._pool = pool
        self._batch = batch
        self._waiting: defaultdict[AttemptId, list[_Item]] = defaultdict(list)
        self._running: dict[AttemptId, asyncio.Task[None]] = {}

    async def add(self, attempt: AttemptId, hospital_id: str, sha256: str, content: bytes) -> Counted:
        """Add one upload.

        Raises: FedmeshError: CIPHERTEXT_INVALID when it is none; as `Sum.counted`; NOT_FOUND when the sum is over;
            LOST_RACE, STORE_UNAVAILABLE, STORE_FULL, SERVICE_UNAVAILABLE, DEADLINE_EXCEEDED, and then it may be sent
            again.
        """
        item = _Item(hospital_id, sha256, content)
        self._waiting[attempt].append(item)
        if attempt not in self._running:
            self._running[attempt] = asyncio.create_task(self._drain(attempt))
        return await item.done

    async def _drain(self, attempt: AttemptId) -> None:
        try:
            while self._waiting[attempt]:
                # Lets the uploads that have arrived together become one batch.
                await asyncio.sleep(0)
                batch = self._take(attempt)
                try:
                    with attempt_span("aggregator.add", attempt.job_id, attempt.round, attempt.attempt) as span:
                        span.set_attribute("fedmesh.uploads", len(batch))
                        await self._add(attempt, batch)
                except Exception as error:
                    for item in batch:
                        _fail(item, error)
        finally:
            del self._running[attempt]
            del self._waiting[attempt]

    def _take(self, attempt: AttemptId) -> list[_Item]:
        """The next batch: one upload a hospital, so that nothing is added twice in one step."""
        batch: dict[str, _Item] = {}
        for item in self._waiting[attempt]:
            if len(batch) < self._batch:
                batch.setdefault(item.hospital_id, item)
        taken = list(batch.values())
        self._waiting[attempt] = [item for item in self._waiting[attempt] if item not in taken]
        return taken

    async def _add(self, attempt: AttemptId, batch: list[_Item]) -> None:
        for _ in range(_MOST_CONFLICTS):
            held = await self._store.get(attempt)
            if held is None:
                raise not_open(attempt)
            batch = [item for item in batch if not _settled(item, held)]
            if not batch or await self._switch(held, batch):
                return
        raise FedmeshError(Code.LOST_RACE, "other uploads were always faster: send the same bytes again")

    async def _switch(self, held: Sum, batch: list[_Item]) -> bool:
        """Try to move the record on; False when it has changed meanwhile."""
        accumulator = None
        if held.blob is not None:
            accumulator = await self._store.read_blob(held.blob)
            if accumulator is None:
                return False
        addition = await self._compute(held.form, accumulator, batch)
        for position, error in addition.refused.items():
            _fail(batch[position], error)
        added = [item for position, item in enumerate(batch) if position not in addition.refused]
        if not added or addition.accumulator is None:
            return True
        content = addition.accumulator
        blob = Blob(new_id(), len(content), hashlib.sha256(content).hexdigest())
        await self._store.write_blob(blob, content, held.expires_at)
        result = await self._store.count(held, blob, {item.hospital_id: item.sha256 for item in added})
        if result == "ok":
            for item in added:
                _succeed(item, Counted(len(held.contributions) + len(added), already=False))
            return True
        await self._store.drop_blob(blob)
        return False

    async def _compute(self, form: Form, accumulator: bytes | None, batch: Sequence[_Item]) -> Addition:
        try:
            return await self._run(form, accumulator, batch)
        except FedmeshError as error:
            if error.code not in (Code.CIPHERTEXT_INVALID, Code.DEADLINE_EXCEEDED) or len(batch) == 1:
                if error.code is Code.CIPHERTEXT_INVALID:
                    return Addition(accumulator, {0: error})
                raise
        # One of them crashed or hung the worker: find out which, so that it costs the others nothing.
        refused: dict[int, FedmeshError] = {}
        for position, item in enumerate(batch):
            try:
                one = await self._run(form, accumulator, [item])
            except FedmeshError as error:
                refused[position] = error
                continue
            if 0 in one.refused:
                refused[position] = one.refused[0]
            accumulator = one.accumulator
        return Addition(accumulator, refused)

    async def _run(self, form: Form, accumulator: bytes | None, batch: Sequence[_Item]) -> Addition:
        uploads = [item.content for item in batch]
        answer = await self._pool.run(
            add_batch, accumulator, uploads, form.parameter_set, form.vector_length, form.lanes
        )
        return parse_addition(answer)


def _settled(item: _Item, held: Sum) -> bool:
    """Whether the record alone decides about an upload: counted before, or refused."""
    if item.done.done():
        return True
    try:
        if not held.counted(item.hospital_id, item.sha256):
            return False
        _succeed(item, Counted(len(held.contributions), already=True))
    except FedmeshError as error:
        _fail(item, error)
    return True


def _succeed(item: _Item, counted: Counted) -> None:
    if not item.done.done():
        item.done.set_result(counted)


def _fail(item: _Item, error: Exception) -> None:
    if not item.done.done():
        item.done.set_exception(error)
