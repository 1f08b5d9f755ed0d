"""Model states: content-addressed, received with bounded memory, stored only when whole and right."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from typing import IO, Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.registry.domain.entities import BlobHeader
from services.registry.domain.events import event
from services.registry.domain.rules import require_running
from services.registry.usecases.jobs import find_job
from services.registry.usecases.ports import Store, Transaction

CHUNK_BYTES: Final = 1024 * 1024


class BlobUseCases:
    """max_bytes: largest blob. max_uploads: received at once. memory_bytes: of one upload in memory, the rest in
    spool_dir. idle_s: how long an upload may stand still.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        changed: Callable[[], None],
        *,
        max_bytes: int,
        max_uploads: int,
        memory_bytes: int,
        spool_dir: str | None,
        idle_s: float,
    ) -> None:
        self._store = store
        self._clock = clock
        self._changed = changed
        self._max_bytes = max_bytes
        self._slots = max_uploads
        self._memory_bytes = memory_bytes
        self._spool_dir = spool_dir
        self._idle_s = idle_s

    async def upload(self, caller: Identity, header: BlobHeader, chunks: AsyncIterator[bytes]) -> str:
        """Receive a blob and store it under its digest; content that the job has already is not stored again.

        The bytes wait outside the database until their length and digest are proven, so a broken upload leaves
        nothing behind and no transaction waits for a slow sender.

        Raises: FedmeshError(NOT_FOUND) for a job that the hospital is not in, (WRONG_STATE) for one that has ended,
            (TOO_LARGE), (CHUNK_STREAM_INVALID) for a stream that is not what its header says, (RATE_LIMITED).
        """
        if header.size_bytes > self._max_bytes:
            raise FedmeshError(
                Code.TOO_LARGE,
                f"the blob has {header.size_bytes} bytes, {self._max_bytes} at most",
                limit=self._max_bytes,
            )
        await self._store.run("UploadBlob.check", caller, lambda tx: _may_store(tx, header))
        if self._slots == 0:
            raise FedmeshError(Code.RATE_LIMITED, "too many uploads at once: try again")
        self._slots -= 1
        try:
            with tempfile.SpooledTemporaryFile(self._memory_bytes, dir=self._spool_dir) as spool:
                await self._receive(caller, header, chunks, spool)
                await self._keep(caller, header, spool)
        except OSError as error:
            raise FedmeshError(Code.STORE_FULL, "the registry has no room for uploads now: try again") from error
        finally:
            self._slots += 1
        return header.sha256

    async def _receive(
        self, caller: Identity, header: BlobHeader, chunks: AsyncIterator[bytes], spool: IO[bytes]
    ) -> None:
        digest = hashlib.sha256()
        received = 0
        try:
            async for chunk in _timely(chunks, self._idle_s):
                received += len(chunk)
                if received > header.size_bytes:
                    raise _broken(f"more than the {header.size_bytes} bytes that its header announced")
                digest.update(chunk)
                await asyncio.to_thread(spool.write, chunk)
            if received != header.size_bytes:
                raise _broken(f"cut short: {received} of {header.size_bytes} bytes came")
            if digest.hexdigest() != header.sha256:
                raise _broken("corrupt: the content does not have the announced SHA-256")
        except FedmeshError as error:
            await self._note_refusal(caller, header, error)
            raise

    async def _note_refusal(self, caller: Identity, header: BlobHeader, error: FedmeshError) -> None:
        facts = {"method": "UploadBlob", "code": error.code.value, "reason": error.message, "sha256": header.sha256}
        told = event("call.refused", self._clock.now(), caller, f"job/{header.job_id}", **facts)
        await self._store.run("UploadBlob.refused", caller, lambda tx: tx.outbox.add([told]))
        self._changed()

    async def _keep(self, caller: Identity, header: BlobHeader, spool: IO[bytes]) -> None:
        async def body(tx: Transaction) -> bool:
            if not await _may_store(tx, header):
                return False
            now = self._clock.now()
            await tx.blobs.add(header, caller.name, _read_chunks(spool), now)
            facts = {"sha256": header.sha256, "size_bytes": header.size_bytes}
            await tx.outbox.add([event("blob.stored", now, caller, f"job/{header.job_id}", **facts)])
            return True

        if await self._store.run("UploadBlob", caller, body):
            self._changed()

    async def download(self, caller: Identity, sha256: str) -> AsyncIterator[bytes]:
        """Chunks of a blob in order, each read in a transaction of its own.

        Raises: FedmeshError(NOT_FOUND) when there is no such blob or the hospital is in none of its jobs.
        """
        size = await self._store.ask("DownloadBlob", caller, lambda tx: tx.blobs.size(sha256))
        if size is None:
            raise FedmeshError(Code.NOT_FOUND, f"there is no blob {sha256}")
        for position in range(-(-size // CHUNK_BYTES)):
            yield await self._chunk(caller, sha256, position)

    async def _chunk(self, caller: Identity, sha256: str, position: int) -> bytes:
        chunk = await self._store.ask("DownloadBlob.chunk", caller, lambda tx: tx.blobs.chunk(sha256, position))
        if chunk is None:
            raise FedmeshError(Code.INTERNAL, f"blob {sha256} lacks chunk {position}")
        return chunk


async def _may_store(tx: Transaction, header: BlobHeader) -> bool:
    """Whether the blob is new to its job.

    Raises: FedmeshError(NOT_FOUND | WRONG_STATE) when it is new and the job takes none.
    """
    job = await find_job(tx, header.job_id)
    if await tx.blobs.size_in_job(header.job_id, header.sha256) is not None:
        return False
    require_running(job)
    return True


async def _timely(chunks: AsyncIterator[bytes], idle_s: float) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(idle_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _broken(f"stalled: no bytes for {idle_s:g} s") from None
        yield chunk


def _read_chunks(spool: IO[bytes]) -> Iterator[bytes]:
    spool.seek(0)
    while chunk := spool.read(CHUNK_BYTES):
        yield chunk


def _broken(what: str) -> FedmeshError:
    return FedmeshError(Code.CHUNK_STREAM_INVALID, f"the upload is {what}: send it again")
