"""What adding holds does not depend on how many uploads there are, nor do downloads hold a sum many times over."""

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from services.aggregator import adding
from services.aggregator.computing import Computer
from services.aggregator.domain.sums import AttemptId, Blob, Contribution, Form, Opened
from services.aggregator.sharing import SharedReads
from services.aggregator.store.chunks import DirectoryChunks
from services.aggregator.store.records import RedisSums
from services.common.clock import SystemClock
from services.common.ids import new_id
from services.common.redis import connect_redis
from services.secure_sum import public, wire
from services.secure_sum.disposable import DisposablePool
from services.secure_sum.parameters import DEFAULT
from tests.support.stores import RedisServer

FORM = Form(DEFAULT.name, 2, 131_072)
"""One whole segment."""
LAYOUT = FORM.layout
UPLOAD = wire.join(
    np.random.default_rng(1).integers(0, DEFAULT.coeff_modulus, LAYOUT.coefficients(0)[1], dtype=np.uint64),
    np.random.default_rng(2).integers(0, 256, (LAYOUT.ciphertexts, 32), dtype=np.uint8),
)


class CountingChunks(DirectoryChunks):
    """How many chunks were read."""

    reads = 0

    async def read_each(self, blobs: Sequence[Blob], index: int) -> list[bytes | None]:
        self.reads += len(blobs)
        return await super().read_each(blobs, index)


@pytest.fixture
async def sums(redis_server: RedisServer) -> AsyncIterator[RedisSums]:
    client = connect_redis(redis_server.config("aggregator"))
    yield RedisSums(client)
    await client.aclose()


async def compute(uploads: int, sums: RedisSums, chunks: DirectoryChunks, pool: DisposablePool) -> tuple[str, int]:
    """The SHA-256 of the sum of so many stored uploads, and the most bytes that this process held meanwhile."""
    attempt, expires_at = AttemptId(new_id(), 1, 1), datetime.now(UTC) + timedelta(minutes=5)
    group = tuple(f"hospital-{number:02d}" for number in range(uploads))
    assert await sums.open(attempt, Opened(FORM, group, dict.fromkeys(group, bytes(32)), "ab" * 32), expires_at)
    for name in group:
        blob = Blob(new_id(), expires_at)
        await chunks.write(blob, 0, UPLOAD)
        await sums.count(attempt, name, Contribution("aa" * 32, "bb" * 32, blob.blob_id))
    await sums.close(attempt, uploads)
    held = await sums.get(attempt)
    assert held is not None
    computer = Computer(sums, chunks, pool, at_once=1)
    tracemalloc.start()
    try:
        return await computer.compute(held, group, ()), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_computing_holds_as_much_for_sixteen_uploads_as_for_four(sums: RedisSums, tmp_path: Path) -> None:
    chunks = CountingChunks(tmp_path, SystemClock())
    async with DisposablePool(preload=(adding.MODULE,)) as pool:
        held = {}
        for uploads in (4, 16):
            chunks.reads = 0
            sha256, held[uploads] = await compute(uploads, sums, chunks, pool)
            assert chunks.reads == uploads
            expected = public.sum_segment(LAYOUT, 0, [UPLOAD] * uploads, np.zeros(LAYOUT.coefficients(0)[1], np.uint64))
            assert sha256 == hashlib.sha256(expected).hexdigest()
    assert held[16] < held[4] + len(UPLOAD) // 2
    assert held[16] < 4 * len(expected)


async def test_a_chunk_that_many_want_is_read_once_and_forgotten_with_the_last(tmp_path: Path) -> None:
    chunks, blob = CountingChunks(tmp_path, SystemClock()), Blob(new_id(), datetime.now(UTC) + timedelta(minutes=5))
    await chunks.write(blob, 0, UPLOAD)
    await chunks.write(blob, 1, UPLOAD[::-1])
    shared = SharedReads(chunks)
    first = asyncio.create_task(shared.read(blob, 0))
    others = [asyncio.create_task(shared.read(blob, index)) for index in (0, 0, 1, 1)]
    await asyncio.sleep(0)
    first.cancel()
    found = await asyncio.gather(*others)
    assert [chunk and chunk.content for chunk in found] == [UPLOAD, UPLOAD, UPLOAD[::-1], UPLOAD[::-1]]
    assert found[0] is found[1]
    assert found[2] is found[3]
    assert chunks.reads == 3  # that of the cancelled call, and one a chunk
    assert await shared.read(blob, 0) is found[0]
    assert chunks.reads == 3
    others.clear()
    found.clear()
    await chunks.drop(blob, 2)
    assert await shared.read(blob, 0) is None
    assert await shared.read(blob, 2) is None
