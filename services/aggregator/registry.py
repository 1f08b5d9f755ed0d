"""The registry, as the aggregator uses it: it keeps events for the audit log."""

from collections.abc import Sequence

from fedmesh.audit.v1 import audit_pb2
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.aggregator.domain.events import Event
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id

_TIMEOUT_S = 5.0
# Covers a registry that is being restarted, within the patience of the hospital that waits.
_PATIENCE_S = 3.0


class RegistryEvents:
    def __init__(self, channel: MeshChannel) -> None:
        self._stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)

    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable; known event ids are skipped by the registry.

        Raises: FedmeshError, retryable while the registry is away.
        """
        request = registry_pb2.RecordEventsRequest(request_id=new_id(), events=[_wire(item) for item in events])
        await call(self._stub.RecordEvents, request, timeout_s=_TIMEOUT_S, patience_s=_PATIENCE_S)


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
