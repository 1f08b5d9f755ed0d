"""The registry, as the aggregator uses it: it keeps events for the audit log, and strikes."""

import asyncio
from collections.abc import Sequence

from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.aggregator.domain.events import Event
from services.aggregator.domain.sums import AttemptId
from services.common.errors import FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id

_TIMEOUT_S = 5.0
# The registry takes 500 events a call; one upload makes one.
_MOST_CALLERS = 100
_MOST_REASON = 500

_Caller = tuple[Sequence[Event], "asyncio.Future[None]"]


class RegistryClient:
    """Records events in groups: what comes while one call is under way goes with the next, in one transaction there."""

    def __init__(self, channel: MeshChannel) -> None:
        self._stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
        self._waiting: list[_Caller] = []
        self._sending: asyncio.Task[None] | None = None

    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable; known event ids are skipped by the registry.

        Raises: FedmeshError, retryable while the registry is away.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((events, done))
        if self._sending is None:
            self._sending = asyncio.create_task(self._drain())
        await done

    async def strike(self, strike_id: str, attempt: AttemptId, hospital_id: str, error: FedmeshError) -> None:
        """Note a strike; the same id counts once.

        Raises: FedmeshError, retryable while the registry is away.
        """
        request = registry_pb2.RecordStrikeRequest(
            request_id=strike_id,
            hospital_id=hospital_id,
            code=error.code.value,
            reason=error.message[:_MOST_REASON],
            attempt=round_pb2.Attempt(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt),
        )
        await call(self._stub.RecordStrike, request, timeout_s=_TIMEOUT_S)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                # Lets the callers that come together go together.
                await asyncio.sleep(0)
                group, self._waiting = self._waiting[:_MOST_CALLERS], self._waiting[_MOST_CALLERS:]
                await self._send(group)
        finally:
            self._sending = None

    async def _send(self, group: list[_Caller]) -> None:
        try:
            await self._call([event for events, _done in group for event in events])
        except FedmeshError as error:
            if len(group) > 1 and not error.retryable:
                # One caller's events were refused: that must not cost the others theirs.
                for caller in group:
                    await self._send([caller])
                return
            _settle(group, error)
        except BaseException as error:
            _settle(group, error)
            raise
        else:
            _settle(group, None)

    async def _call(self, events: Sequence[Event]) -> None:
        request = registry_pb2.RecordEventsRequest(request_id=new_id(), events=[_wire(item) for item in events])
        await call(self._stub.RecordEvents, request, timeout_s=_TIMEOUT_S)


def _settle(group: list[_Caller], error: BaseException | None) -> None:
    for _events, done in group:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


def _wire(event: Event) -> audit_pb2.Event:
    at = Timestamp()
    at.FromDatetime(event.occurred_at)
    return audit_pb2.Event(
        event_id=event.event_id,
        type=event.type,
        occurred_at=at,
        actor=event.actor,
        subject=event.subject,
        body_json=event.body_json,
    )
