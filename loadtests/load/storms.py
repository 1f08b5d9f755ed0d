"""The calls of the scenarios: what is made, by whom, and how many bytes it carries."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from loadtests.chaos.calls import KINDS, OPERATOR, SERVICE, Known
from loadtests.chaos.schedule import mixture
from loadtests.load.consortium import PATIENCE_S, Clients
from services.common.grpc.client import call
from services.common.ids import new_id
from services.embedded.stack import CONSORTIUM
from services.secure_sum.statements import adverts_digest
from tests.support.aggregation import Attempt, Upload, signed

Call = Callable[[], Awaitable[int]]
"""Makes a call and returns the bytes that it carried. Raises: FedmeshError."""
_SUM_LIFETIME_S: Final = 3600.0
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


class Uploads:
    """Real ciphertexts of the founding hospitals for one open sum; afterwards the same bytes again, as retries send."""

    def __init__(self, clients: Clients, made: Attempt) -> None:
        self._clients, self._attempt = clients, made
        self._ready = [(name, made.upload_of(name)) for name in made.sharers]
        self._turns = cycle(self._ready)
        # A hospital sends one upload at a time: a second one takes the place of the first.
        self._sending = {name: asyncio.Lock() for name in made.sharers}

    async def open(self) -> None:
        """Open the sum. Raises: FedmeshError."""
        made, expires = self._attempt, Timestamp()
        expires.FromDatetime(datetime.now(UTC) + timedelta(seconds=_SUM_LIFETIME_S))
        roster = made.consortium.roster
        request = aggregator_pb2.OpenSumRequest(
            request_id=new_id(),
            attempt=made.ids,
            form=made.form(),
            group=made.sharers,
            signers=[
                aggregator_pb2.SignerKey(hospital_id=name, signing_key=roster.signing_key(name))
                for name in made.sharers
            ],
            adverts_sha256=adverts_digest(made.consortium.adverts),
            expires_at=expires,
        )
        stub = await self._clients.of(SERVICE, "aggregator")
        await call(stub.OpenSum, request, patience_s=PATIENCE_S)

    def following(self) -> tuple[str, Call]:
        name, upload = next(self._turns)
        return "aggregator.Upload", lambda: self._send(name, upload)

    async def _send(self, name: str, upload: Upload) -> int:
        header = aggregator_pb2.UploadHeader(
            request_id=new_id(),
            attempt=round_pb2.Attempt.FromString(self._attempt.ids.SerializeToString()),
            form=self._attempt.form(),
            size_bytes=self._attempt.layout.upload_bytes,
            ciphertext_sha256=upload.sha256,
            upload=signed(upload.signed),
        )

        async def messages() -> AsyncIterator[Any]:
            yield aggregator_pb2.UploadRequest(header=header)
            for segment in upload.segments:
                yield aggregator_pb2.UploadRequest(chunk=segment)

        stub = await self._clients.of(name, "aggregator")
        async with self._sending[name]:
            await call(stub.Upload, messages, timeout_s=60, patience_s=PATIENCE_S)
        return int(self._attempt.layout.upload_bytes)
