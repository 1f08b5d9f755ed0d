"""The calls of the scenarios: what is made, by whom, and how many bytes it carries."""

import time
from collections.abc import Awaitable, Callable
from itertools import cycle
from typing import Final

from fedmesh.audit.v1 import audit_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from loadtests.chaos.calls import KINDS, OPERATOR, SERVICE, Known
from loadtests.chaos.schedule import mixture
from loadtests.load.consortium import PATIENCE_S, Clients
from services.common.grpc.client import call
from services.common.ids import new_id
from services.embedded.stack import CONSORTIUM

Call = Callable[[], Awaitable[int]]
"""Makes a call and returns the bytes that it carried. Raises: FedmeshError."""
_EVENTS_A_CALL: Final = 10


def control(clients: Clients, known: Known) -> Callable[[], tuple[str, Call]]:
    """The control-plane mix of `make chaos`."""
    kinds = mixture({name: kind.weight for name, kind in KINDS.items()}, seed=2)

    def following() -> tuple[str, Call]:
        name = next(kinds)
        kind = KINDS[name]

        async def make() -> int:
            request, stub = kind.make(known), await clients.of(kind.caller, kind.service)
            response = await call(getattr(stub, kind.method), request, patience_s=PATIENCE_S)
            if isinstance(response, audit_pb2.GetCheckpointResponse):
                # The second line of a checkpoint is the log's size.
                known.log_size = int(response.checkpoint.splitlines()[1])
            return int(request.ByteSize() + response.ByteSize())

        return name, make

    return following


def audit(clients: Clients, known: Known) -> Callable[[], tuple[str, Call]]:
    """Ten events a call, as services send them from their outboxes; every fourth call is a reader's."""
    turns = cycle(("append", "append", "append", "read"))

    async def append() -> int:
        now = Timestamp()
        now.FromNanoseconds(time.time_ns())
        events = [
            audit_pb2.Event(
                event_id=new_id(),
                type="load.noted",
                occurred_at=now,
                actor=f"spiffe://{CONSORTIUM}/service/coordinator",
                subject=f"job/{known.job_id}",
                body_json="{}",
            )
            for _ in range(_EVENTS_A_CALL)
        ]
        request = audit_pb2.AppendEventsRequest(request_id=new_id(), events=events)
        stub = await clients.of(SERVICE, "audit")
        response = await call(stub.AppendEvents, request, patience_s=PATIENCE_S)
        known.log_size = max(known.log_size, response.placements[-1].index + 1)
        return int(request.ByteSize())

    async def read() -> int:
        request = audit_pb2.GetInclusionProofRequest(index=known.chance.randrange(max(1, known.log_size)))
        response = await call((await clients.of(OPERATOR, "audit")).GetInclusionProof, request, patience_s=PATIENCE_S)
        return int(response.ByteSize())

    def following() -> tuple[str, Call]:
        turn = next(turns)
        return ("audit.AppendEvents", append) if turn == "append" else ("audit.GetInclusionProof", read)

    return following
