"""What the aggregator does: one method for each RPC."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from services.aggregator.combiner import Combiner, Counted
from services.aggregator.domain.events import Event, contribution_accepted, upload_refused
from services.aggregator.domain.sums import AttemptId, Form, State, Sum, not_open, require_openable
from services.aggregator.store.redis import RedisSums, chunk_count
from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span

# What a hospital could only cause by sending something that is no contribution.
_STRIKES: Final = frozenset({Code.CIPHERTEXT_INVALID, Code.CHUNK_STREAM_INVALID})


class Events(Protocol):
    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable. Raises: FedmeshError."""
        ...


@dataclass(frozen=True)
class UploadHeader:
    """What a hospital announces; see `fedmesh.aggregator.v1.UploadHeader`."""

    request_id: str
    attempt: AttemptId
    form: Form
    size_bytes: int
    sha256: str


class AggregatorUseCases:
    """consortium: the trust domain of the hospitals. max_uploads: received at once. idle_s: how long one may stall."""

    def __init__(
        self,
        store: RedisSums,
        combiner: Combiner,
        events: Events,
        clock: Clock,
        *,
        consortium: str,
        max_uploads: int,
        idle_s: float,
    ) -> None:
        self._store = store
        self._combiner = combiner
        self._events = events
        self._clock = clock
        self._consortium = consortium
        self._slots = max_uploads
        self._idle_s = idle_s

    async def open(self, attempt: AttemptId, form: Form, group: tuple[str, ...], expires_at: datetime) -> int:
        """Make room for a sum; the exact size of an upload in bytes.

        Raises: FedmeshError(INVALID_ARGUMENT); (ALREADY_EXISTS) when it is open with another form or group.
        """
        size = require_openable(form, group, expires_at, self._clock.now())
        if not await self._store.open(attempt, form, group, expires_at):
            raise FedmeshError(Code.ALREADY_EXISTS, "this attempt's sum is open with another form or group")
        return size

    async def upload(self, hospital_id: str, header: UploadHeader, chunks: AsyncIterator[bytes]) -> Counted:
        """Receive one ciphertext and count it exactly once. The event is durable before this returns.

        Raises: FedmeshError: NOT_FOUND, PERMISSION_DENIED, WRONG_STATE, ALREADY_CONTRIBUTED; RATE_LIMITED;
            CIPHERTEXT_INVALID and CHUNK_STREAM_INVALID, which are recorded as strikes, and nothing has changed;
            STORE_UNAVAILABLE, SERVICE_UNAVAILABLE and other retryable ones.
        """
        if self._slots == 0:
            raise FedmeshError(Code.RATE_LIMITED, "too many uploads at once: try again")
        self._slots -= 1
        try:
            with attempt_span("aggregator.upload", *header.attempt):
                return await self._upload(hospital_id, header, chunks)
        except FedmeshError as error:
            if error.code in _STRIKES:
                await self._strike(hospital_id, header, error)
            raise
        finally:
            self._slots += 1

    async def _upload(self, hospital_id: str, header: UploadHeader, chunks: AsyncIterator[bytes]) -> Counted:
        held = await self._store.get(header.attempt)
        if held is None:
            raise not_open(header.attempt)
        already = held.counted(hospital_id, header.sha256)
        held.require_form(header.form)
        if header.size_bytes != held.form.upload_bytes:
            raise FedmeshError(
                Code.CIPHERTEXT_INVALID,
                f"an upload of this sum has {held.form.upload_bytes} bytes, not {header.size_bytes}",
            )
        content = await self._receive(header, chunks)
        if already:
            counted = Counted(len(held.contributions), already=True)
        else:
            counted = await self._combiner.add(header.attempt, hospital_id, header.sha256, content)
        if not already or hospital_id in held.unrecorded:
            await self._record(held, {hospital_id: header.sha256})
        return counted

    async def _receive(self, header: UploadHeader, chunks: AsyncIterator[bytes]) -> bytes:
        content = bytearray()
        digest = hashlib.sha256()
        try:
            while True:
                async with asyncio.timeout(self._idle_s):
                    chunk = await anext(chunks)
                if len(content) + len(chunk) > header.size_bytes:
                    raise _broken(f"it has more than the {header.size_bytes} bytes that its header announced")
                digest.update(chunk)
                content += chunk
        except StopAsyncIteration:
            pass
        except TimeoutError:
            raise FedmeshError(Code.DEADLINE_EXCEEDED, f"the upload stalled for {self._idle_s:g} s") from None
        if len(content) != header.size_bytes:
            raise _broken(f"it was cut short: {len(content)} of {header.size_bytes} bytes came")
        if digest.hexdigest() != header.sha256:
            raise _broken("its content does not have the announced SHA-256")
        return bytes(content)

    async def _strike(self, hospital_id: str, header: UploadHeader, error: FedmeshError) -> None:
        # Before the refusal is answered: while the registry is away the answer is "try again", and no strike is lost.
        told = upload_refused(
            header.attempt, self._consortium, hospital_id, header.request_id, error, self._clock.now()
        )
        await self._events.record([told])

    async def _record(self, held: Sum, contributions: dict[str, str]) -> None:
        now, size = self._clock.now(), held.form.upload_bytes
        await self._events.record(
            [
                contribution_accepted(held.attempt, self._consortium, name, sha256, size, now)
                for name, sha256 in contributions.items()
            ]
        )
        await self._store.mark_recorded(held.attempt, list(contributions))

    async def close(self, attempt: AttemptId, minimum: int) -> Sum:
        """Fix a sum; every contributor's event is durable before this returns.

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
            missing = {name: closed.contributions[name] for name in sorted(closed.unrecorded)}
            if missing:
                await self._record(closed, missing)
            return closed

    async def download(self, hospital_id: str, attempt: AttemptId) -> AsyncIterator[bytes]:
        """The closed sum in chunks.

        Raises: FedmeshError(NOT_FOUND | PERMISSION_DENIED); (WRONG_STATE) while it is open.
        """
        held = await self.get(attempt)
        held.require_member(hospital_id)
        if held.state is not State.CLOSED or held.blob is None:
            raise FedmeshError(Code.WRONG_STATE, "the sum is still open: wait until it is closed")
        for index in range(chunk_count(held.blob.size_bytes)):
            chunk = await self._store.read_chunk(held.blob, index)
            if chunk is None:
                raise not_open(attempt)
            yield chunk

    async def get(self, attempt: AttemptId) -> Sum:
        """Raises: FedmeshError(NOT_FOUND)."""
        held = await self._store.get(attempt)
        if held is None:
            raise not_open(attempt)
        return held

    async def discard(self, attempt: AttemptId) -> None:
        """Forget a sum; harmless when there is none."""
        held = await self._store.get(attempt)
        if held is not None:
            await self._store.discard(held)


def _broken(what: str) -> FedmeshError:
    return FedmeshError(Code.CHUNK_STREAM_INVALID, f"the upload was refused: {what}")
