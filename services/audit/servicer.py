"""gRPC adapter of the audit service."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.audit.domain.event import Event
from services.audit.domain.witnesses import Alarm, AlarmKind
from services.audit.sequencer import Placed
from services.audit.usecases import LogUseCases
from services.audit.witnessing import WitnessUseCases
from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller

# The range of google.protobuf.Timestamp: 0001-01-01T00:00:00Z to 9999-12-31T23:59:59Z.
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND: Final = -62_135_596_800
_LAST_SECOND: Final = 253_402_300_799
_KINDS: Final = {
    audit_pb2.ALARM_KIND_FORK: AlarmKind.FORK,
    audit_pb2.ALARM_KIND_ROLLBACK: AlarmKind.ROLLBACK,
    audit_pb2.ALARM_KIND_BAD_CHECKPOINT: AlarmKind.BAD_CHECKPOINT,
    audit_pb2.ALARM_KIND_UNPROVABLE: AlarmKind.UNPROVABLE,
}
_WIRE_KINDS: Final = {kind: number for number, kind in _KINDS.items()}


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, log: LogUseCases, witnesses: WitnessUseCases) -> None:
        self._log = log
        self._witnesses = witnesses

    async def AppendEvents(
        self, request: audit_pb2.AppendEventsRequest, _context: Any
    ) -> audit_pb2.AppendEventsResponse:
        appended = await self._log.append(caller(), request.request_id, [read_event(event) for event in request.events])
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

    async def GetEntry(self, request: audit_pb2.GetEntryRequest, _context: Any) -> audit_pb2.GetEntryResponse:
        leaf, size, hashes = await self._log.entry(caller(), request.index, request.tree_size)
        return audit_pb2.GetEntryResponse(leaf=leaf, tree_size=size, hashes=hashes)

    async def GetOfferedCheckpoint(
        self, _request: audit_pb2.GetOfferedCheckpointRequest, _context: Any
    ) -> audit_pb2.GetOfferedCheckpointResponse:
        return audit_pb2.GetOfferedCheckpointResponse(checkpoint=await self._witnesses.offered())

    async def AddCosignature(
        self, request: audit_pb2.AddCosignatureRequest, _context: Any
    ) -> audit_pb2.AddCosignatureResponse:
        await self._witnesses.add_cosignature(
            caller(), request.request_id, request.size, request.public_key, request.cosignature
        )
        return audit_pb2.AddCosignatureResponse()

    async def ListCosignedCheckpoints(
        self, request: audit_pb2.ListCosignedCheckpointsRequest, _context: Any
    ) -> audit_pb2.ListCosignedCheckpointsResponse:
        response = audit_pb2.ListCosignedCheckpointsResponse()
        for head, note in await self._witnesses.cosigned(request.before_size, request.limit):
            response.checkpoints.add(size=head.size, checkpoint=note).recorded_at.FromDatetime(head.recorded_at)
        return response

    async def RaiseAlarm(self, request: audit_pb2.RaiseAlarmRequest, _context: Any) -> audit_pb2.RaiseAlarmResponse:
        kind = _KINDS.get(request.kind)
        if kind is None:
            raise FedmeshError(Code.INVALID_ARGUMENT, "kind must say what is wrong")
        await self._witnesses.raise_alarm(
            caller(), request.request_id, kind, request.held_checkpoint, request.seen_checkpoint, request.reason
        )
        return audit_pb2.RaiseAlarmResponse()

    async def ListAlarms(self, request: audit_pb2.ListAlarmsRequest, _context: Any) -> audit_pb2.ListAlarmsResponse:
        alarms, total = await self._witnesses.alarms(request.limit)
        return audit_pb2.ListAlarmsResponse(alarms=[_alarm(alarm) for alarm in alarms], total=total)


def read_event(event: audit_pb2.Event) -> Event:
    """An event as it came. Raises: FedmeshError(INVALID_ARGUMENT) for a time that is missing or out of range."""
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


def _alarm(alarm: Alarm) -> audit_pb2.Alarm:
    wired = audit_pb2.Alarm(
        hospital_id=alarm.hospital_id,
        kind=_WIRE_KINDS[alarm.kind],
        held_checkpoint=alarm.held,
        seen_checkpoint=alarm.seen,
        reason=alarm.reason,
    )
    wired.recorded_at.FromDatetime(alarm.recorded_at)
    return wired


def _placement(placed: Placed) -> audit_pb2.Placement:
    return audit_pb2.Placement(
        event_id=str(placed.entry.event_id),
        index=placed.entry.index,
        leaf_hash=placed.entry.leaf_hash,
        inclusion_proof=placed.proof,
    )
