"""Calls that were refused for who made them, on their way to the audit log.

The first refusal of its kind is an entry at once; those that follow within a minute are one more entry, with their
number. Kinds are bounded for each caller and altogether, and so is what waits to be sent: whoever keeps calling fills
neither the log nor this process's memory. What is lost to these bounds is counted.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple
from uuid import uuid4

from prometheus_client import Counter

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.telemetry import get_logger

log = get_logger(__name__)

EVENT_TYPE: Final = "access.refused"
REFUSALS: Final = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED})
"""Errors that speak of who calls."""

WINDOW_S: Final = 60.0
# Kinds (method and reason) of one caller within a window that are told apart; further ones are counted together.
KINDS_OF_ONE: Final = 16
KINDS: Final = 512
WAITING: Final = 1024
_OTHERS: Final = "various"
_MOST_REASON: Final = 300
# The registry takes 500 events in a call, and a message has about 1 MiB.
_BATCH: Final = 200
_FIRST_BACKOFF_S: Final = 0.2
_MAX_BACKOFF_S: Final = 10.0
_LAST_TRY_S: Final = 1.0

_DROPPED = Counter(
    "fedmesh_access_refusals_dropped_total", "Refusals of callers that the audit log will not hold, by bound", ["bound"]
)
for _bound in ("kinds", "queue", "audit"):
    _DROPPED.labels(_bound)


@dataclass(frozen=True)
class Refusal:
    """A refused call. caller: None when the certificate does not say who it is. method: `Service/Method`."""

    caller: Identity | None
    method: str
    code: Code
    reason: str


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
"""Makes events durable. Raises FedmeshError, retryable when they should be sent again."""


class _Kind(NamedTuple):
    caller: Identity | None
    method: str
    code: Code
    reason: str


@dataclass
class _Window:
    """ends: monotonic seconds. repeated: refusals after the first one. since, until: of these."""

    ends: float
    repeated: int
    since: datetime
    until: datetime


class RefusalLog:
    """`note` goes into the server's gate; `run` sends. Used from one event loop.

    service: the identity of this process, which is the events' actor: it did the refusing. now: monotonic seconds.
    """

    def __init__(self, service: Identity, send: Send, clock: Clock, now: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._send = send
        self._clock = clock
        self._now = now
        self._windows: dict[_Kind, _Window] = {}
        self._kinds_of: Tally[Identity | None] = Tally()
        self._queue: deque[RefusalEvent] = deque()
        self._woken = asyncio.Event()

    def note(self, refusal: Refusal) -> None:
        """Take note of a refusal. Costs little and never waits."""
        self._close_windows(self._now())
        at = self._clock.now()
        kind = self._kind(refusal)
        window = self._windows.get(kind)
        if window is not None:
            window.since = at if not window.repeated else window.since
            window.until = at
            window.repeated += 1
            return
        if len(self._windows) >= KINDS:
            _DROPPED.labels("kinds").inc()
            return
        self._windows[kind] = _Window(self._now() + WINDOW_S, 0, at, at)
        self._kinds_of[kind.caller] += 1
        self._enqueue(kind, 1, at, at)

    def _kind(self, refusal: Refusal) -> _Kind:
        kind = _Kind(refusal.caller, refusal.method, refusal.code, refusal.reason[:_MOST_REASON])
        if kind in self._windows or self._kinds_of[refusal.caller] < KINDS_OF_ONE:
            return kind
        return kind._replace(method=_OTHERS, reason=_OTHERS)

    def _close_windows(self, now: float) -> None:
        for kind in [kind for kind, window in self._windows.items() if window.ends <= now]:
            window = self._windows.pop(kind)
            self._kinds_of[kind.caller] -= 1
            if not self._kinds_of[kind.caller]:
                del self._kinds_of[kind.caller]
            if window.repeated:
                self._enqueue(kind, window.repeated, window.since, window.until)

    def _enqueue(self, kind: _Kind, count: int, since: datetime, until: datetime) -> None:
        if len(self._queue) >= WAITING:
            _DROPPED.labels("queue").inc(count)
            return
        self._queue.append(_event(self._service, kind, count, since, until))
        self._woken.set()

    async def run(self) -> None:
        """Send until cancelled, and then once more what is known. An audit log that is away ends nothing."""
        failures = 0
        try:
            while True:
                await self._rest(failures)
                self._close_windows(self._now())
                failures = 0 if await self._send_waiting() else failures + 1
        finally:
            self._close_windows(float("inf"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_TRY_S):
                    await self._send_waiting()

    async def _rest(self, failures: int) -> None:
        """Until there is something to send, or a window ends; after failures for a while in any case."""
        if failures:
            await asyncio.sleep(min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures, 20)))
            return
        ending = min((window.ends for window in self._windows.values()), default=None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if ending is None else max(0.0, ending - self._now())):
                await self._woken.wait()

    async def _send_waiting(self) -> bool:
        """Send what waits; False when some of it must be sent again."""
        self._woken.clear()
        while self._queue:
            batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
            try:
                await self._send_each(batch)
            except FedmeshError as error:
                log.warning("refusals_not_told", code=error.code.value, reason=error.message, waiting=len(self._queue))
                return False
            for _ in batch:
                self._queue.popleft()
        return True

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
            _DROPPED.labels("audit").inc()
            log.error("refusal_not_taken", body=batch[0].body_json, code=error.code.value, reason=error.message)


def _event(service: Identity, kind: _Kind, count: int, since: datetime, until: datetime) -> RefusalEvent:
    caller = kind.caller
    body = {
        "caller": "unknown" if caller is None else str(caller),
        "method": kind.method,
        "code": kind.code.value,
        "reason": kind.reason,
        "count": count,
        "first_at": since.isoformat(timespec="seconds"),
        "last_at": until.isoformat(timespec="seconds"),
    }
    return RefusalEvent(
        str(uuid4()),
        EVENT_TYPE,
        until,
        str(service),
        "caller/unknown" if caller is None else f"{caller.kind.value}/{caller.name}",
        json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True),
    )
