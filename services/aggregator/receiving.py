"""Receives one upload: segment after segment, each checked and stored before the next is looked at."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

from services.aggregator import adding, metrics
from services.aggregator.domain.sums import AttemptId, Blob
from services.aggregator.domain.uploads import UploadHeader
from services.aggregator.ports import ChunkStore
from services.common.errors import Code, FedmeshError
from services.secure_sum.disposable import DisposablePool
from services.secure_sum.statements import Upload
from services.secure_sum.wire import Layout


class Stream:
    """The segments of one upload as they come; `end` makes the receiver stop waiting for more.

    Raises, while iterated: FedmeshError(DEADLINE_EXCEEDED) when it stands still; (CANCELLED) after `end`.
    """

    def __init__(self, segments: AsyncIterator[bytes], idle_s: float) -> None:
        self._segments = segments
        self._idle_s = idle_s
        self._waiting: asyncio.Timeout | None = None
        self._ended = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(0 if self._ended else self._idle_s) as self._waiting:
                return await anext(self._segments)
        except TimeoutError:
            if self._ended:
                raise FedmeshError(Code.CANCELLED, "a newer upload of this hospital took its place") from None
            raise FedmeshError(Code.DEADLINE_EXCEEDED, f"the upload stalled for {self._idle_s:g} s") from None
        finally:
            self._waiting = None

    def end(self) -> None:
        self._ended = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())


class Streams:
    """The uploads that this replica is receiving: so many at most, and one of a hospital in an attempt.

    A newer upload ends the one before it, which is most often one whose connection broke unnoticed.
    """

    def __init__(self, most: int, idle_s: float) -> None:
        self._most = most
        self._idle_s = idle_s
        self._open: dict[tuple[AttemptId, str], Stream] = {}
        self._count = 0

    def open(self, attempt: AttemptId, hospital_id: str, segments: AsyncIterator[bytes]) -> Stream:
        """Raises: FedmeshError(RATE_LIMITED) when there are too many."""
        if self._count >= self._most:
            raise FedmeshError(Code.RATE_LIMITED, "too many uploads at once: try again")
        before = self._open.get((attempt, hospital_id))
        if before is not None:
            before.end()
        self._count += 1
        metrics.UPLOADING.set(self._count)
        stream = self._open[attempt, hospital_id] = Stream(segments, self._idle_s)
        return stream

    def close(self, attempt: AttemptId, hospital_id: str, stream: Stream) -> None:
        self._count -= 1
        metrics.UPLOADING.set(self._count)
        if self._open.get((attempt, hospital_id)) is stream:
            del self._open[attempt, hospital_id]


class Receiver:
    """Holds one segment at a time, whatever the size of the upload."""

    def __init__(self, chunks: ChunkStore, pool: DisposablePool) -> None:
        self._chunks = chunks
        self._pool = pool

    async def receive(
        self, layout: Layout, header: UploadHeader, upload: Upload, stream: Stream, blob: Blob, *, again: bool
    ) -> None:
        """Store the segments of an upload under `blob`. again: only those that are not there any more.

        Raises: FedmeshError: CHUNK_STREAM_INVALID when they are not the announced ones; CIPHERTEXT_INVALID; CANCELLED
            when they end too early; and retryable ones.
        """
        whole = hashlib.sha256()
        index = 0
        async for segment in stream:
            if index == layout.segments:
                raise _broken(f"it has more than {layout.segments} segment(s)")
            _check_segment(layout, index, segment, upload)
            whole.update(segment)
            if not again or await self._chunks.read(blob, index) is None:
                await self._pool.run(adding.check, layout, index, segment)
                await self._chunks.write(blob, index, segment)
            metrics.UPLOAD_BYTES.inc(len(segment))
            index += 1
        if index != layout.segments:
            # No strike: gRPC ends the stream in this way too when a connection breaks.
            raise FedmeshError(
                Code.CANCELLED, f"the upload ended after {index} of {layout.segments} segments: send it again"
            )
        if whole.hexdigest() != header.sha256:
            raise _broken("its content does not have the announced SHA-256")


def _check_segment(layout: Layout, index: int, segment: bytes, upload: Upload) -> None:
    expected = layout.upload_segment_bytes(index)
    if len(segment) != expected:
        raise _broken(f"segment {index} has {len(segment)} bytes, not {expected}")
    if hashlib.sha256(segment).hexdigest() != upload.segments[index]:
        raise _broken(f"segment {index} does not have the SHA-256 in the statement")


def _broken(what: str) -> FedmeshError:
    return FedmeshError(Code.CHUNK_STREAM_INVALID, f"the upload was refused: {what}")
