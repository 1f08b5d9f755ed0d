"""gRPC adapter of the audit service."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.audit.domain.event import Event
from services.audit.sequencer import Placed
from services.audit.usecases import LogUseCases
from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller

# The range of google.protobuf.Timestamp: 0001-01-01T00:00:00Z to 9999-12-31T23:59:59Z.
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800
_LAST_SECOND: Final = 253_402_300_799


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, log: LogUseCases) -> None:
        self._log = log

    async def AppendEvents(
        self, request: audit_pb2.AppendEventsRequest, _context: Any
    ) -> audit_pb2.AppendEventsResponse:
        appended = await self._log.append(caller(), request.request_id, [_event(event) for event in request.events])
        return audit_pb2.AppendEventsResponse(
            placements=[_placement(placed) for placed in appended.placed], checkpoint=appended.note
        )

    async def GetCheckpoint(
        self, _request: audit_pb2.GetCheckpointRequest, _context: Any
    ) -> audit_pb2.GetCheckpointResponse:
        return audit_pb2.GetCheckpointResponse(checkpoint=await self._log.checkpoint())

    async def GetInclusionProof(
        self, request: audit_pb2.GetInclusionProofRequest, _context: Any
    ) -> audit_pb2.GetInclusionProofResponse:
        size, leaf_hash, hashes = await self._log.inclusion(request.index, request.tree_size)
        return audit_pb2.GetInclusionProofResponse(tree_size=size, leaf_hash=leaf_hash, hashes=hashes)

    async def GetConsistencyProof(
        self, request: audit_pb2.GetConsistencyProofRequest, _context: Any
    ) -> audit_pb2.GetConsistencyProofResponse:
        size, hashes = await self._log.consistency(request.first_size, request.second_size)
        return audit_pb2.GetConsistencyProofResponse(second_size=size, hashes=hashes)

    async def ListEntries(
        self, request: audit_pb2.ListEntriesRequest, _context: Any
    ) -> AsyncIterator[audit_pb2.ListEntriesResponse]:
        async for index, leaf in self._log.entries(request.start_index, request.limit):
            yield audit_pb2.ListEntriesResponse(index=index, leaf=leaf)


def _event(event: audit_pb2.Event) -> Event:
    if not event.HasField("occurred_at"):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"event {event.event_id}: occurred_at is missing")
    occurred_at = _rfc3339(event.occurred_at.seconds, event.occurred_at.nanos)
    if occurred_at is None:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"event {event.event_id}: occurred_at is out of range")
    return Event(event.event_id, event.type, occurred_at, event.actor, event.subject, event.body_json)


def _rfc3339(seconds: int, nanos: int) -> str | None:
    """UTC text with nine decimals, None outside years 1 to 9999; made here so that no protobuf release changes it."""
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND or not 0 <= nanos < 10**9:
        return None
    return f"{(_EPOCH + timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()}.{nanos:09d}Z"


def _placement(placed: Placed) -> audit_pb2.Placement:
    return audit_pb2.Placement(
        event_id=str(placed.entry.event_id),
        index=placed.entry.index,
        leaf_hash=placed.entry.leaf_hash,
        inclusion_proof=placed.proof,
    )
