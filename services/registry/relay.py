"""Carries events from the outbox to the audit log, at least once and in order; the log counts each event once."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from uuid import UUID

from fedmesh.audit.v1 import audit_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import Counter, Gauge

from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.telemetry import get_logger
from services.registry.domain.entities import Event
from services.registry.usecases.ports import Store

log = get_logger(__name__)

Append = Callable[[audit_pb2.AppendEventsRequest], Awaitable[audit_pb2.AppendEventsResponse]]

# A message is 1 MiB at most, one event about 66 KiB.
_BATCH_BYTES: Final = 768 * 1024
_FIRST_BACKOFF_S: Final = 0.1
# Answers that speak of the events, not of the audit service or of our standing with it.
_GATHER_S: Final = 0.5
_ABOUT_EVENTS: Final = frozenset({Code.INVALID_ARGUMENT, Code.TOO_LARGE, Code.REQUEST_ID_REUSED})

_WAITING = Gauge("fedmesh_registry_outbox_waiting", "Events that the audit log does not hold yet")
_LAG = Gauge("fedmesh_registry_outbox_lag_seconds", "Age of the oldest event that the audit log does not hold yet")
_REFUSED = Gauge("fedmesh_registry_outbox_refused", "Events that the audit log refused and an operator must look at")
_SENT = Counter("fedmesh_registry_outbox_sent_total", "Events that the audit log took")
_FAILURES = Counter("fedmesh_registry_outbox_failures_total", "Tries that failed, by error code", ["code"])


class Relay:
    """Several replicas may run one each: an event is claimed for `claim_s` seconds, then free for another relay."""

    def __init__(
        self, store: Store, append: Append, *, interval_s: float, batch: int, claim_s: float, max_backoff_s: float
    ) -> None:
        self._store = store
        self._append = append
        self._interval_s = interval_s
        self._batch = batch
        self._claim_s = claim_s
        self._max_backoff_s = max_backoff_s
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is something to send."""
        self._woken.set()

    async def run(self) -> None:
        """Send until cancelled. Nothing that the database or the audit service does ends this loop."""
        failures = 0
        while True:
            self._woken.clear()
            try:
                try:
                    more = await self.send_once()
                finally:
                    # Above all while nothing can be sent: then the lag is what an operator must see.
                    await self._measure()
                failures = 0
            except FedmeshError as error:
                failures += 1
                more = False
                _FAILURES.labels(error.code.value).inc()
                log.warning("outbox_not_sent", code=error.code.value, reason=error.message, failures=failures)
            if failures:
                ceiling = min(self._max_backoff_s, _FIRST_BACKOFF_S * 2 ** min(failures, 20))
                await asyncio.sleep(ceiling * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            elif not more:
                await self._rest()

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                await self._woken.wait()
        # A round writes some thirty events within a second: a moment's wait makes few batches of them, and keeps the
        # relay out of the way of whoever waits for the round.
        await asyncio.sleep(_GATHER_S)

    async def send_once(self) -> bool:
        """Send one batch; True when there may be more.

        Raises: FedmeshError when the database or the audit service is away; the events stay in the outbox.
        """
        events = await self._store.run("outbox.claim", None, lambda tx: tx.outbox.claim(self._batch, self._claim_s))
        if not events:
            return False
        try:
            for part in _parts(events):
                await self._send(part)
        except BaseException:
            await self._give_back([item.event_id for item in events])
            raise
        return len(events) == self._batch

    async def _give_back(self, event_ids: Sequence[UUID]) -> None:
        try:
            await self._store.run("outbox.release", None, lambda tx: tx.outbox.release(event_ids))
        except FedmeshError as error:  # the claim runs out by itself
            log.warning("outbox_not_released", reason=error.message)

    async def _send(self, events: Sequence[Event]) -> None:
        try:
            indices = await self._place(events)
        except FedmeshError as error:
            if error.code not in _ABOUT_EVENTS:
                raise
            await self._isolate(events, error)
            return
        await self._store.run("outbox.placed", None, lambda tx: tx.outbox.placed(indices))
        _SENT.inc(len(events))

    async def _isolate(self, events: Sequence[Event], error: FedmeshError) -> None:
        """One bad event must not keep the others out of the log: halve the batch until it stands alone."""
        if len(events) > 1:
            middle = len(events) // 2
            await self._send(events[:middle])
            await self._send(events[middle:])
            return
        bad = events[0]
        log.error("event_refused", event_id=str(bad.event_id), type=bad.type, reason=error.message)
        await self._store.run("outbox.refused", None, lambda tx: tx.outbox.refused(bad.event_id, error.message))

    async def _place(self, events: Sequence[Event]) -> dict[UUID, int]:
        request = audit_pb2.AppendEventsRequest(request_id=new_id(), events=[_wire(item) for item in events])
        response = await self._append(request)
        indices = {UUID(item.event_id): int(item.index) for item in response.placements}
        if set(indices) != {item.event_id for item in events}:
            raise FedmeshError(Code.INTERNAL, "the audit service did not place every event")
        return indices

    async def _measure(self) -> None:
        waiting, lag, refused = await self._store.ask("outbox.backlog", None, lambda tx: tx.outbox.backlog())
        _WAITING.set(waiting)
        _LAG.set(lag)
        _REFUSED.set(refused)


def _parts(events: Sequence[Event]) -> list[list[Event]]:
    parts: list[list[Event]] = [[]]
    room = _BATCH_BYTES
    for item in events:
        size = len(item.body_json) + 512
        if size > room and parts[-1]:
            parts.append([])
            room = _BATCH_BYTES
        parts[-1].append(item)
        room -= size
    return parts


def _wire(item: Event) -> audit_pb2.Event:
    at = Timestamp()
    at.FromDatetime(item.occurred_at)
    return audit_pb2.Event(
        event_id=str(item.event_id),
        type=item.type,
        occurred_at=at,
        actor=item.actor,
        subject=item.subject,
        body_json=item.body_json,
    )
