"""Where the segments of uploads and sums are: immutable chunks, each kept with its SHA-256 until its sum expires.

Two stores behind one interface, with one suite of tests over both. A chunk is written completely or not at all, and
what was damaged afterwards is as if it were gone: a sum is never made of other bytes than those that were counted.
"""

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis

from services.aggregator.domain.sums import Blob
from services.aggregator.ports import ChunkStore
from services.aggregator.store.records import milliseconds
from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.redis import redis_errors
from services.common.telemetry import get_logger

log = get_logger(__name__)

_DIGEST_BYTES: Final = 32
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class RedisChunks(ChunkStore):
    """Chunks as Redis strings that expire by themselves: for models up to some ten million parameters."""

    def __init__(self, client: aioredis.Redis) -> None:
        self._client = client

    async def write(self, blob: Blob, index: int, content: bytes) -> None:
        async with redis_errors():
            sealed = _digest(content) + content
            await self._client.set(_key(blob, index), sealed, pxat=milliseconds(blob.expires_at))

    async def read_each(self, blobs: Sequence[Blob], index: int) -> list[bytes | None]:
        async with redis_errors():
            kept: Any = await self._client.mget([_key(blob, index) for blob in blobs])
        return [
            None if each is None else _opened(each[:_DIGEST_BYTES], each[_DIGEST_BYTES:], blob, index)
            for blob, each in zip(blobs, kept, strict=True)
        ]

    async def drop(self, blob: Blob, count: int) -> None:
        async with redis_errors(), self._client.pipeline(transaction=False) as pipe:
            for index in range(count):
                pipe.unlink(_key(blob, index))
            await pipe.execute()

    async def ready(self) -> bool:
        # The records' Redis, whose state the service reports anyway.
        return True


def _key(blob: Blob, index: int) -> str:
    return f"aggregator:chunk:{blob.blob_id}:{index}"


class DirectoryChunks(ChunkStore):
    """Chunks as files, for large models; on a volume that all replicas share.

    A blob is a folder named by its expiry and id, so that any replica can sweep without asking anybody. A file appears
    by renaming, complete. It is not synced to the disk: what a power failure takes costs what losing Redis costs, an
    attempt, while a sync of every segment would cost each round seconds; and its digest tells a torn file.
    """

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock

    async def write(self, blob: Blob, index: int, content: bytes) -> None:
        await asyncio.to_thread(self._write, blob, index, content)

    async def read_each(self, blobs: Sequence[Blob], index: int) -> list[bytes | None]:
        now = self._clock.now()
        return await asyncio.to_thread(lambda: [self._read(blob, index, now) for blob in blobs])

    async def drop(self, blob: Blob, count: int) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder(blob), ignore_errors=True)

    async def ready(self) -> bool:
        return os.access(self._directory, os.R_OK | os.W_OK | os.X_OK)

    async def sweep_forever(self, every_s: float) -> None:
        """Remove what is over, for ever."""
        while True:
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(every_s)

    def sweep(self) -> int:
        """Remove the blobs that are over; how many there were."""
        now, swept = milliseconds(self._clock.now()), 0
        try:
            with _os_errors():
                folders = list(self._directory.iterdir())
        except FedmeshError as error:
            log.warning("sweep_failed", reason=error.message)
            return 0
        for folder in folders:
            expiry, _, _blob_id = folder.name.partition("-")
            if expiry.isdecimal() and int(expiry) <= now:
                shutil.rmtree(folder, ignore_errors=True)
                swept += 1
        return swept

    def _folder(self, blob: Blob) -> Path:
        return self._directory / f"{milliseconds(blob.expires_at)}-{blob.blob_id}"

    def _write(self, blob: Blob, index: int, content: bytes) -> None:
        folder = self._folder(blob)
        unfinished = folder / f"{index}.{new_id()}"
        with _os_errors():
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                with unfinished.open("wb") as file:
                    file.write(_digest(content))
                    file.write(content)
                unfinished.rename(folder / str(index))
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise

    def _read(self, blob: Blob, index: int, now: datetime) -> bytes | None:
        # A blob is over at its time, whether or not it was swept yet.
        if blob.expires_at <= now:
            return None
        with _os_errors():
            try:
                with (self._folder(blob) / str(index)).open("rb", buffering=0) as file:
                    digest, content = file.read(_DIGEST_BYTES), file.readall()
            except FileNotFoundError:
                return None
        return _opened(digest, content, blob, index)


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise FedmeshError(Code.STORE_FULL, "the directory of chunks is full: free disk") from error
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the directory of chunks cannot be used: try again") from error


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _opened(digest: bytes, content: bytes, blob: Blob, index: int) -> bytes | None:
    if _digest(content) != digest:
        log.error("chunk_damaged", blob=blob.blob_id, index=index)
        return None
    return content
