"""One suite over both stores of chunks."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.aggregator.domain.sums import Blob
from services.aggregator.ports import ChunkStore
from services.aggregator.store.chunks import DirectoryChunks, RedisChunks
from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.redis import connect_redis
from tests.support.stores import REDIS_BUILDS, RedisServer

CONTENT = os.urandom(983_040)


@dataclass
class Subject:
    """A store, and what a test does to it from outside."""

    store: ChunkStore
    damage: Callable[[Blob, int], None]
    """Changes the last byte of a chunk."""
    left: Callable[[], int]
    """How many chunks take up room, after whatever forgets those that are over has run."""


@pytest.fixture(params=["directory", *REDIS_BUILDS])
def redis_build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def subject(request: pytest.FixtureRequest, redis_build: str, tmp_path: Path) -> AsyncIterator[Subject]:
    if redis_build == "directory":
        yield in_directory(tmp_path)
        return
    redis_server: RedisServer = request.getfixturevalue("redis_server")
    client = connect_redis(redis_server.config("aggregator"))
    admin = redis_server.client()

    def damage(blob: Blob, index: int) -> None:
        key = f"aggregator:chunk:{blob.blob_id}:{index}"
        admin.setrange(key, admin.strlen(key) - 1, b"\0")

    def left() -> int:
        return len(list(admin.scan_iter("*")))

    yield Subject(RedisChunks(client), damage, left)
    await client.aclose()
    admin.close()


def in_directory(folder: Path) -> Subject:
    store = DirectoryChunks(folder, SystemClock())

    def damage(blob: Blob, index: int) -> None:
        (path,) = folder.glob(f"*-{blob.blob_id}/{index}")
        path.write_bytes(path.read_bytes()[:-1] + b"\0")

    def left() -> int:
        store.sweep()
        return len(list(folder.rglob("*/*")))

    return Subject(store, damage, left)


def blob(seconds: float = 60) -> Blob:
    return Blob(new_id(), datetime.now(UTC) + timedelta(seconds=seconds))


async def test_what_was_written_is_read(subject: Subject) -> None:
    one, other = blob(), blob()
    contents = [CONTENT, b"x", b"", CONTENT[::-1]]
    await asyncio.gather(*(subject.store.write(one, index, content) for index, content in enumerate(contents)))
    await subject.store.write(other, 0, b"other")
    assert [await subject.store.read(one, index) for index in range(4)] == contents
    assert await subject.store.read(other, 0) == b"other"
    assert await subject.store.ready()


async def test_what_was_never_written_is_not_there(subject: Subject) -> None:
    made = blob()
    await subject.store.write(made, 1, b"x")
    assert await subject.store.read(made, 0) is None
    assert await subject.store.read(made, 11) is None
    assert await subject.store.read(blob(), 1) is None


async def test_writing_again_is_harmless(subject: Subject) -> None:
    made = blob()
    await asyncio.gather(*(subject.store.write(made, 0, CONTENT) for _ in range(5)))
    assert await subject.store.read(made, 0) == CONTENT
    assert subject.left() == 1


async def test_a_damaged_chunk_is_as_if_gone_and_can_be_written_again(subject: Subject) -> None:
    made = blob()
    content = b"a segment that ends with one: \1"
    await subject.store.write(made, 0, content)
    subject.damage(made, 0)
    assert await subject.store.read(made, 0) is None
    await subject.store.write(made, 0, content)
    assert await subject.store.read(made, 0) == content


async def test_a_dropped_blob_is_gone_and_others_stay(subject: Subject) -> None:
    one, other = blob(), blob()
    for index in range(3):
        await subject.store.write(one, index, b"x")
        await subject.store.write(other, index, b"y")
    await subject.store.drop(one, 3)
    await subject.store.drop(one, 3)
    await subject.store.drop(blob(), 3)
    assert [await subject.store.read(one, index) for index in range(3)] == [None] * 3
    assert await subject.store.read(other, 2) == b"y"
    assert subject.left() == 3


async def test_a_blob_is_over_at_its_time(subject: Subject) -> None:
    short, long = blob(0.5), blob()
    await subject.store.write(short, 0, b"x")
    await subject.store.write(long, 0, b"y")
    while await subject.store.read(short, 0) is not None:  # noqa: ASYNC110 - Redis decides
        await asyncio.sleep(0.05)
    while subject.left() > 1:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert await subject.store.read(long, 0) == b"y"


async def test_a_store_that_is_away_says_so(redis_server: RedisServer, tmp_path: Path) -> None:
    client = connect_redis(redis_server.config("aggregator"))
    redis_server.stop()
    stores: list[ChunkStore] = [RedisChunks(client), DirectoryChunks(tmp_path / "gone", SystemClock())]
    made = blob()
    for store in stores:
        with pytest.raises(FedmeshError) as caught:
            await store.write(made, 0, b"x")
        assert caught.value.code is Code.STORE_UNAVAILABLE
    redis_server.start()
    await client.aclose()
    assert not await stores[1].ready()


def test_a_directory_sweeps_only_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "1-old").mkdir()
    (tmp_path / "99999999999999-new").mkdir()
    store = DirectoryChunks(tmp_path, SystemClock())
    assert store.sweep() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["99999999999999-new", "lost+found"]


async def test_an_unfinished_file_is_no_chunk(tmp_path: Path) -> None:
    store, made = DirectoryChunks(tmp_path, SystemClock()), blob()
    await store.write(made, 0, b"x")
    folder = tmp_path / f"{int(made.expires_at.timestamp() * 1000)}-{made.blob_id}"
    (folder / f"1.{new_id()}").write_bytes(b"torn")
    assert await store.read(made, 1) is None
    assert await store.read(made, 0) == b"x"
