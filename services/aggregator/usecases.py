"""What the aggregator does: one method for each RPC."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from services.aggregator import metrics
from services.aggregator.computing import Computer
from services.aggregator.domain.events import Event, contribution_accepted, upload_refused
from services.aggregator.domain.openings import plan_of
from services.aggregator.domain.sums import AttemptId, Blob, Contribution, Opened, Sum, not_open, require_openable
from services.aggregator.domain.uploads import UploadHeader, check_header
from services.aggregator.ports import ChunkStore, Sums
from services.aggregator.receiving import Receiver, Stream, Streams
from services.aggregator.sharing import Chunk, SharedReads
from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.telemetry import attempt_span
from services.secure_sum.opening import MaskKey, Opening
from services.secure_sum.statements import Upload

# What a hospital could only cause by sending something that no honest node sends.
_STRIKES: Final = frozenset({Code.CIPHERTEXT_INVALID, Code.CHUNK_STREAM_INVALID, Code.STATEMENT_INVALID})

# Small segments are answered together, up to so many bytes.
_TOGETHER_BYTES: Final = 64 << 10


class Registry(Protocol):
    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable. Raises: FedmeshError."""
        ...

    async def strike(self, strike_id: str, attempt: AttemptId, hospital_id: str, error: FedmeshError) -> None:
        """Note a strike against a hospital; the same id counts once. Raises: FedmeshError."""
        ...


class Counted(NamedTuple):
    """contributors: how many are counted now. already: this upload was counted before."""

    contributors: int
    already: bool


@dataclass(frozen=True)
class Parts:
    """What the use cases stand on."""

    store: Sums
    chunks: ChunkStore
    receiver: Receiver
    streams: Streams
    computer: Computer
    registry: Registry
    clock: Clock


class AggregatorUseCases:
    """consortium: the trust domain of the hospitals."""

    def __init__(self, parts: Parts, consortium: str) -> None:
        self._store = parts.store
        self._chunks = parts.chunks
        self._receiver = parts.receiver
        self._streams = parts.streams
        self._computer = parts.computer
        self._sums = SharedReads(parts.chunks)
        self._registry = parts.registry
        self._clock = parts.clock
        self._consortium = consortium

    async def open(self, attempt: AttemptId, opened: Opened, expires_at: datetime) -> int:
        """Make room for a sum; the exact size of an upload in bytes.

        Raises: FedmeshError(INVALID_ARGUMENT); (ALREADY_EXISTS) when it is open with another content.
        """
        size = require_openable(opened, expires_at, self._clock.now())
        if not await self._store.open(attempt, opened, expires_at):
            raise FedmeshError(
                Code.ALREADY_EXISTS, "this attempt's sum is open with another form, group, keys or adverts"
            )
        return size

    async def upload(self, hospital_id: str, header: UploadHeader, segments: AsyncIterator[bytes]) -> Counted:
        """Receive one ciphertext and count it exactly once. The event is durable before this returns.

        Raises: FedmeshError: NOT_FOUND, PERMISSION_DENIED, WRONG_STATE, ALREADY_CONTRIBUTED; RATE_LIMITED; CANCELLED
            when it ended early or a newer one came; CIPHERTEXT_INVALID, CHUNK_STREAM_INVALID and STATEMENT_INVALID,
            which are recorded as strikes, and nothing has changed; STORE_UNAVAILABLE, SERVICE_UNAVAILABLE and other
            retryable ones.
        """
        stream = self._streams.open(header.attempt, hospital_id, segments)
        started, outcome = time.perf_counter(), "broken"
        try:
            with attempt_span("aggregator.upload", *header.attempt):
                counted = await self._upload(hospital_id, header, stream)
            outcome = "repeated" if counted.already else "counted"
            metrics.UPLOAD_SECONDS.observe(time.perf_counter() - started)
            return counted
        except FedmeshError as error:
            outcome = error.code.value
            if error.code in _STRIKES:
                await self._strike(hospital_id, header.attempt, error)
            raise
        finally:
            metrics.UPLOADS.labels(outcome).inc()
            self._streams.close(header.attempt, hospital_id, stream)

    async def _upload(self, hospital_id: str, header: UploadHeader, stream: Stream) -> Counted:
        held = await self.get(header.attempt)
        already = held.counted(hospital_id, header.sha256, header.upload.sha256)
        upload = check_header(held, hospital_id, header)
        if already:
            # The stored segments are mended by the way, in case the store lost some.
            await self._receiver.receive(held.layout, header, upload, stream, held.blob(hospital_id), again=True)
        else:
            held, already = await self._count(held, hospital_id, header, upload, stream)
        if hospital_id in held.unrecorded:
            await self._record(held, [hospital_id])
        return Counted(len(held.contributions), already)

    async def _count(
        self, held: Sum, hospital_id: str, header: UploadHeader, upload: Upload, stream: Stream
    ) -> tuple[Sum, bool]:
        """Store and count an upload; the record afterwards, and whether another call was faster with the same bytes."""
        blob = Blob(new_id(), held.expires_at)
        contribution = Contribution(header.sha256, header.upload.sha256, blob.blob_id)
        try:
            await self._receiver.receive(held.layout, header, upload, stream, blob, again=False)
        except BaseException:
            await self._drop(held, blob)
            raise
        await self._store.count(held.attempt, hospital_id, contribution)
        # The record decides, not the answer: it may be the answer to a repetition after a lost connection.
        now = await self._store.get(held.attempt)
        mine = now is not None and now.contributions.get(hospital_id) == contribution
        if not mine:
            await self._drop(held, blob)
        if now is None:
            raise not_open(held.attempt)
        # Says why it was not counted: closed meanwhile, or other bytes were faster.
        now.counted(hospital_id, contribution.ciphertext_sha256, contribution.upload_sha256)
        return now, not mine

    async def _drop(self, held: Sum, blob: Blob) -> None:
        with suppress(FedmeshError):  # what stays is forgotten at its time
            await self._chunks.drop(blob, held.layout.segments)

    async def _strike(self, hospital_id: str, attempt: AttemptId, error: FedmeshError) -> None:
        # Before the refusal is answered: while the registry is away the answer is "try again", and no strike is lost.
        strike_id = new_id()
        told = upload_refused(attempt, self._consortium, hospital_id, strike_id, error, self._clock.now())
        await self._registry.record([told])
        await self._registry.strike(strike_id, attempt, hospital_id, error)
        metrics.STRIKES.labels(error.code.value).inc()

    async def _record(self, held: Sum, names: Sequence[str]) -> None:
        now, size = self._clock.now(), held.layout.upload_bytes
        events = [
            contribution_accepted(
                held.attempt, self._consortium, name, held.contributions[name].ciphertext_sha256, size, now
            )
            for name in names
        ]
        await self._registry.record(events)
        await self._store.mark_recorded(held.attempt, names)

    async def close(self, attempt: AttemptId, minimum: int) -> Sum:
        """Fix who was counted; every contributor's event is durable before this returns.

        Raises: FedmeshError(NOT_FOUND); (INVALID_ARGUMENT) for a minimum below 1; (WRONG_STATE) with too few.
        """
        if minimum < 1:
            raise FedmeshError(Code.INVALID_ARGUMENT, "minimum_contributors must be at least 1")
        with attempt_span("aggregator.close", *attempt):
            closed = await self._store.close(attempt, minimum)
            if closed is None:
                raise not_open(attempt)
            if isinstance(closed, int):
                raise FedmeshError(
                    Code.WRONG_STATE,
                    f"{closed} hospitals have contributed, {minimum} are needed: the sum stays open",
                    contributors=closed,
                )
            if closed.unrecorded:
                await self._record(closed, sorted(closed.unrecorded))
            return closed

    async def compute(
        self, attempt: AttemptId, survivors: Sequence[str], keys: Sequence[MaskKey], opening: Opening
    ) -> tuple[str, int]:
        """Add the survivors' uploads and take their masks off; SHA-256 and size of the encrypted sum.

        Raises: FedmeshError: NOT_FOUND; WRONG_STATE while it is open; INVALID_ARGUMENT; STATEMENT_INVALID when a seed
            does not fit what was advertised; EQUIVOCATION when it was fixed with other inputs; retryable ones.
        """
        held = await self.get(attempt)
        plan = plan_of(held, survivors, keys, opening)
        return await self._computer.compute(held, survivors, plan), held.layout.sum_bytes

    async def download(self, hospital_id: str, attempt: AttemptId) -> AsyncIterator[Chunk]:
        """The computed sum, segment by segment.

        Raises: FedmeshError(NOT_FOUND | PERMISSION_DENIED); (WRONG_STATE) before it is computed.
        """
        held = await self.get(attempt)
        held.require_member(hospital_id)
        if held.result is None:
            raise FedmeshError(Code.WRONG_STATE, "the sum is not computed yet: wait for the task")
        for index in range(held.layout.segments):
            segment = await self._sums.read(held.result[0], index)
            if segment is None:
                raise not_open(attempt)
            metrics.DOWNLOAD_BYTES.inc(len(segment.content))
            yield segment

    async def segments(self, caller: str, attempt: AttemptId, index: int) -> AsyncIterator[dict[str, bytes]]:
        """One segment of every counted upload but the caller's own, one hospital at a time or, when they are small,
        some, sorted; those whose segment is lost are left out, for the sum may not need them.

        Raises: FedmeshError(NOT_FOUND | PERMISSION_DENIED); (WRONG_STATE) while the sum is open; (INVALID_ARGUMENT)
            when there is no such segment.
        """
        held = await self.get(attempt)
        held.require_member(caller)
        held.require_closed()
        at_once = max(1, _TOGETHER_BYTES // held.layout.upload_segment_bytes(index))
        names = sorted(held.contributions.keys() - {caller})
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            found = await self._chunks.read_each([held.blob(name) for name in some], index)
            yield {name: segment for name, segment in zip(some, found, strict=True) if segment is not None}

    async def get(self, attempt: AttemptId) -> Sum:
        """Raises: FedmeshError(NOT_FOUND)."""
        held = await self._store.get(attempt)
        if held is None:
            raise not_open(attempt)
        return held

    async def discard(self, attempt: AttemptId) -> None:
        """Forget a sum and the uploads; harmless when there is none."""
        held = await self._store.get(attempt)
        if held is None:
            return
        await self._store.discard(attempt)
        for blob in held.blobs():
            await self._chunks.drop(blob, held.layout.segments)
