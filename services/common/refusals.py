"""Calls that were refused for who made them, on their way to the audit log.

A refused caller gets its answer once the refusal is on disk, where the process has a folder for that (`RefusalSpool`):
what a process that is killed had not told yet, the next one tells. Without a folder, refusals wait in memory.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from prometheus_client import Gauge

from services.common.clock import Clock
from services.common.errors import FedmeshError
from services.common.identity import Identity
from services.common.refusal_book import DROPPED, Changes, Entry, Refusal, RefusalBook
from services.common.refusal_spool import DISK_FAILING, RefusalSpool
from services.common.telemetry import get_logger

log = get_logger(__name__)

EVENT_TYPE: Final = "access.refused"
WAITING: Final = 1024
"""Entries that wait in memory at most, without a folder."""

# The registry takes 500 events in a call, and a message has about 1 MiB.
_BATCH: Final = 200
_FIRST_BACKOFF_S: Final = 0.2
_MAX_BACKOFF_S: Final = 10.0
_LAST_TRY_S: Final = 1.0
# Between two writes: what is refused meanwhile shares the second one's fsync.
_PAUSE_S: Final = 0.02
# How long a refused caller waits for a disk that does not answer.
_PATIENCE_S: Final = 10.0

_WAITING = Gauge("fedmesh_access_refusals_waiting", "Entries of refused calls that the audit log does not have yet")


@dataclass(frozen=True)
class RefusalEvent:
    """See `fedmesh.audit.v1.Event`."""

    event_id: str
    type: str
    occurred_at: datetime
    actor: str
    subject: str
    body_json: str


Send = Callable[[Sequence[RefusalEvent]], Awaitable[None]]
"""Makes events durable, once however often they are sent. Raises FedmeshError, retryable for those to be sent again."""


class RefusalLog:
    """`note` goes into the server's gate; `run` sends. Used from one event loop, and for one `run`.

    service: the identity of this process, which is the events' actor: it did the refusing. now: monotonic seconds.
    spool: where entries wait; closed when `run` ends. None: in memory.
    """

    def __init__(
        self,
        service: Identity,
        send: Send,
        clock: Clock,
        now: Callable[[], float] = time.monotonic,
        spool: RefusalSpool | None = None,
    ) -> None:
        self._service = service
        self._send = send
        self._now = now
        self._spool = spool
        kept = [] if spool is None else spool.kept
        self._book = RefusalBook(clock, WAITING if spool is None else spool.most, kept, now)
        if kept:
            log.info("refusals_found", entries=len(kept))
        self._woken = asyncio.Event()
        self._writing = asyncio.Lock()
        self._written = 0
        self._next_write = 0.0
        self._failing = False
        # One thread: a write that a cancelled caller began ends before the next one begins.
        self._thread = ThreadPoolExecutor(1, "refusals")
        _WAITING.set_function(lambda: len(self._book))

    async def note(self, refusal: Refusal) -> None:
        """Take note of a refusal; returns once it is on disk. Never fails: it is told, if not from the disk."""
        self._book.note(refusal)
        self._woken.set()
        if self._spool is not None and not self._failing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._write()

    async def run(self) -> None:
        """Send until cancelled, and then once more what is known. An audit log that is away ends nothing."""
        failures = 0
        try:
            while True:
                self._book.end_windows()
                failures = 0 if await self._send_waiting() and not self._failing else failures + 1
                await self._rest(failures)
        finally:
            await self._end()

    async def _end(self) -> None:
        self._book.end_windows(all_of_them=True)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_TRY_S):
                    await self._send_waiting()
            await self._write()
        finally:
            spool, self._spool = self._spool, None
            self._thread.shutdown()
            if spool is not None:
                spool.close()

    async def _rest(self, failures: int) -> None:
        """Until there is something to send, or a window ends; after failures for a while in any case."""
        if failures:
            await asyncio.sleep(min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures, 20)))
            return
        ending = self._book.next_end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if ending is None else max(0.0, ending - self._now())):
                await self._woken.wait()

    async def _write(self) -> None:
        """Have everything that is known now on disk, or know that the disk fails.

        Whoever comes while a write is under way shares the next one.
        """
        version = self._book.version
        async with self._writing:
            if self._written >= version:
                return
            await asyncio.sleep(self._next_write - self._now())
            known, changes = self._book.version, self._book.changes()
            try:
                if self._spool is not None:
                    await self._in_thread(self._spool, changes)
            except BaseException as error:
                self._book.give_back(changes)
                if not isinstance(error, FedmeshError):
                    raise
                self._note_disk(error)
            else:
                self._written = known
                self._note_disk(None)

    async def _in_thread(self, spool: RefusalSpool, changes: Changes) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, spool.write, changes)
        finally:
            self._next_write = self._now() + _PAUSE_S

    def _note_disk(self, error: FedmeshError | None) -> None:
        failing = error is not None
        if failing != self._failing:
            self._failing = failing
            DISK_FAILING.set(failing)
            if error is not None:
                log.error("refusals_not_written", reason=error.message, entries=len(self._book))
            else:
                log.info("refusals_written_again", entries=len(self._book))

    async def _send_waiting(self) -> bool:
        """Send what waits; False when some of it must be sent again."""
        self._woken.clear()
        while True:
            # What is sent is on disk first, as it is: it must be sent again with the same bytes.
            await self._write()
            batch = self._book.finished(_BATCH, unwritten=self._failing)
            if not batch:
                # What is beyond the bounds comes last: until now it could still grow.
                if self._book.release():
                    continue
                return True
            try:
                await self._send_each([_event(self._service, entry) for entry in batch])
            except FedmeshError as error:
                log.warning("refusals_not_told", code=error.code.value, reason=error.message, waiting=len(self._book))
                return False
            self._book.forget(batch)

    async def _send_each(self, batch: Sequence[RefusalEvent]) -> None:
        """Raises: FedmeshError that is retryable; an event that is refused for good must not hold up the others."""
        try:
            await self._send(batch)
        except FedmeshError as error:
            if error.retryable:
                raise
            if len(batch) > 1:
                for event in batch:
                    await self._send_each([event])
                return
            DROPPED.labels("audit").inc()
            log.error("refusal_not_taken", body=batch[0].body_json, code=error.code.value, reason=error.message)


def _event(service: Identity, entry: Entry) -> RefusalEvent:
    """Of one entry always the same, to the byte: the log takes it once."""
    kind = entry.kind
    body = {
        "caller": kind.caller,
        "method": kind.method,
        "code": kind.code,
        "reason": kind.reason,
        "count": entry.count,
        "first_at": entry.since.isoformat(timespec="seconds"),
        "last_at": entry.until.isoformat(timespec="seconds"),
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return RefusalEvent(entry.event_id, EVENT_TYPE, entry.until, str(service), kind.subject, text)
