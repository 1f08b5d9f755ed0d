"""A small audit service for tests: real gRPC and mTLS, a list in memory, and faults on demand."""

from typing import Any

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.common.errors import Code, FedmeshError


class ListAuditLog(audit_pb2_grpc.AuditServiceServicer):
    """Keeps each event once, by its id.

    away: answer UNAVAILABLE. lose_answers: keep the events, then fail as if the answer was lost, so many times.
    poison: refuse batches with an event of this type.
    """

    def __init__(self) -> None:
        self.events: list[audit_pb2.Event] = []
        self.calls = 0
        self.away = False
        self.lose_answers = 0
        self.poison = ""

    def types(self) -> list[str]:
        """In order; without refusals of callers, which come beside what happens."""
        return [event.type for event in self.events if event.type != "access.refused"]

    async def AppendEvents(self, request: audit_pb2.AppendEventsRequest, _context: Any) -> Any:
        self.calls += 1
        if self.away:
            raise FedmeshError(Code.STORE_UNAVAILABLE, "away")
        if any(event.type == self.poison for event in request.events):
            raise FedmeshError(Code.INVALID_ARGUMENT, "an event of this type is not for this log")
        places = {event.event_id: index for index, event in enumerate(self.events)}
        for event in request.events:
            if event.event_id not in places:
                places[event.event_id] = len(self.events)
                self.events.append(event)
        if self.lose_answers:
            self.lose_answers -= 1
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the answer is lost")
        return audit_pb2.AppendEventsResponse(
            placements=[
                audit_pb2.Placement(event_id=event.event_id, index=places[event.event_id]) for event in request.events
            ]
        )
