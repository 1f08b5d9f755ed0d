"""Computes a sum from stored uploads, a few segments at a time: the same bytes whoever does it, and however often."""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from services.aggregator import adding, metrics
from services.aggregator.domain.openings import inputs_digest
from services.aggregator.domain.sums import AttemptId, Blob, Sum, not_open
from services.aggregator.ports import ChunkStore, Sums
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.tasks import end_tasks
from services.common.telemetry import attempt_span
from services.secure_sum.derive import MaskPlan
from services.secure_sum.disposable import DisposablePool


class Computer:
    """at_once: segments in work at a time; each needs memory for one upload's segment, whatever their number."""

    def __init__(self, store: Sums, chunks: ChunkStore, pool: DisposablePool, at_once: int) -> None:
        self._store = store
        self._chunks = chunks
        self._pool = pool
        self._at_once = at_once
        self._running: dict[tuple[AttemptId, str], asyncio.Task[str]] = {}

    async def compute(self, held: Sum, survivors: Sequence[str], plan: MaskPlan) -> str:
        """The SHA-256 of the sum, which is stored then.

        The work goes on when the caller goes away: it finds the result, or the same work under way, when it asks again.

        Raises: FedmeshError: EQUIVOCATION when the attempt's sum was fixed with other inputs; NOT_FOUND when the sum or
            one of its uploads is gone; retryable ones.
        """
        inputs = inputs_digest(survivors, plan)
        fixed = await self._store.fix(held.attempt, inputs)
        if fixed == "gone":
            raise not_open(held.attempt)
        if fixed != "ok":
            raise FedmeshError(
                Code.EQUIVOCATION,
                "this attempt's sum is fixed with other survivors or another opening: it has only one",
            )
        key = (held.attempt, inputs)
        if key not in self._running:
            self._running[key] = task = asyncio.create_task(self._compute(held, survivors, plan, inputs))
            task.add_done_callback(lambda _done: self._running.pop(key))
            task.add_done_callback(_noticed)
        return await asyncio.shield(self._running[key])

    async def close(self) -> None:
        """End the work under way."""
        await end_tasks(list(self._running.values()))

    async def _compute(self, held: Sum, survivors: Sequence[str], plan: MaskPlan, inputs: str) -> str:
        known = await self._store.get(held.attempt)
        if known is not None and known.result is not None and await self._whole(held, known.result[0]):
            return known.result[1]
        started = time.perf_counter()
        blob = Blob(new_id(), held.expires_at)
        with attempt_span("aggregator.compute", *held.attempt) as span:
            span.set_attribute("fedmesh.uploads", len(survivors))
            try:
                sha256 = await self._add(held, survivors, plan, blob)
            except BaseException:
                await self._drop(held, blob)
                raise
            await self._finish(held, inputs, blob, sha256)
        metrics.COMPUTE_SECONDS.observe(time.perf_counter() - started)
        return sha256

    async def _finish(self, held: Sum, inputs: str, blob: Blob, sha256: str) -> None:
        # An error leaves it unknown whether the record was switched: the segments then stay until their time.
        finished = await self._store.finish(held.attempt, inputs, blob, sha256)
        if finished == "ok":
            return
        await self._drop(held, blob)
        if finished == "gone":
            raise not_open(held.attempt)
        raise FedmeshError(Code.INTERNAL, "the same uploads and masks gave another sum before")

    async def _whole(self, held: Sum, blob: Blob) -> bool:
        """Whether a result is there with all its segments; one that the store lost is computed anew."""
        for index in range(held.layout.segments):
            if await self._chunks.read(blob, index) is None:
                return False
        return True

    async def _drop(self, held: Sum, blob: Blob) -> None:
        with suppress(FedmeshError):  # what stays is forgotten at its time
            await self._chunks.drop(blob, held.layout.segments)

    async def _add(self, held: Sum, survivors: Sequence[str], plan: MaskPlan, blob: Blob) -> str:
        whole = hashlib.sha256()
        running: deque[asyncio.Task[bytes]] = deque()
        try:
            for index in range(held.layout.segments):
                running.append(asyncio.create_task(self._segment(held, survivors, plan, blob, index)))
                if len(running) == self._at_once:
                    whole.update(await running.popleft())
            while running:
                whole.update(await running.popleft())
        finally:
            await end_tasks(running)
            for task in running:
                _noticed(task)
        return whole.hexdigest()

    async def _segment(self, held: Sum, survivors: Sequence[str], plan: MaskPlan, blob: Blob, index: int) -> bytes:
        uploads = (self._upload(held, hospital_id, index) for hospital_id in survivors)
        result = await self._pool.run(adding.add, held.layout, index, plan, parts=uploads)
        await self._chunks.write(blob, index, result)
        return result

    async def _upload(self, held: Sum, hospital_id: str, index: int) -> bytes:
        segment = await self._chunks.read(held.blob(hospital_id), index)
        if segment is None:
            raise FedmeshError(
                Code.NOT_FOUND,
                f"segment {index} of {hospital_id}'s upload is gone: it must send the same bytes again",
                hospital_id=hospital_id,
            )
        metrics.COMPUTE_BYTES.inc(len(segment))
        return segment


def _noticed(task: "asyncio.Task[Any]") -> None:
    """Whoever waited for it may be gone: its error is not to be logged as lost."""
    if not task.cancelled():
        task.exception()
