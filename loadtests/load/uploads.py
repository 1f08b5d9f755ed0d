"""Uploads of real ciphertexts, fifteen of which are a sum."""

import asyncio
import multiprocessing
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.common.v1 import round_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from loadtests.chaos.calls import SERVICE
from loadtests.load.consortium import PATIENCE_S, Clients
from loadtests.load.settings import MEMBERS
from loadtests.load.storms import Call
from services.common.grpc.client import PART_BYTES, call, chunks
from services.common.ids import new_id
from services.secure_sum.statements import adverts_digest
from tests.support.aggregation import Attempt, signed

_SUM_LIFETIME_S: Final = 3600.0
# Sums that are made ahead of the uploads where nobody asked for more.
_AHEAD: Final = 2
# An attempt's hospitals are all that is wanted of it: its calls are made here, with certificates of this stack.
_NO_CENTRE: Final[Any] = SimpleNamespace()


@dataclass(frozen=True)
class Upload:
    """One hospital's upload. header: an `UploadHeader`, serialized."""

    hospital: str
    header: bytes
    segments: list[bytes]


@dataclass
class Sum:
    """One attempt's uploads. opening: an `OpenSumRequest`, serialized. unsent: uploads that have not arrived yet."""

    opening: bytes
    attempt: bytes
    upload_bytes: int
    uploads: deque[Upload]
    unsent: int = MEMBERS
    opened: "asyncio.Task[None] | None" = field(default=None, compare=False)


def make_sum(params: int) -> Sum:
    """Real ciphertexts and statements of the founding hospitals, with keys of their own."""
    made = Attempt.of(_NO_CENTRE, MEMBERS, params)
    expires, roster = Timestamp(), made.consortium.roster
    expires.FromDatetime(datetime.now(UTC) + timedelta(seconds=_SUM_LIFETIME_S))
    keys = {name: roster.signing_key(name) for name in made.sharers}
    opening = aggregator_pb2.OpenSumRequest(
        request_id=new_id(),
        attempt=made.ids,
        form=made.form(),
        group=made.sharers,
        signers=[aggregator_pb2.SignerKey(hospital_id=name, signing_key=key) for name, key in keys.items()],
        adverts_sha256=adverts_digest(made.consortium.adverts),
        expires_at=expires,
    )
    uploads = deque(_upload(made, name) for name in made.sharers)
    return Sum(opening.SerializeToString(), made.ids.SerializeToString(), made.layout.upload_bytes, uploads)


def _upload(made: Attempt, name: str) -> Upload:
    upload = made.upload_of(name)
    header = aggregator_pb2.UploadHeader(
        request_id=new_id(),
        attempt=made.ids,
        form=made.form(),
        size_bytes=made.layout.upload_bytes,
        ciphertext_sha256=upload.sha256,
        upload=signed(upload.signed),
    )
    return Upload(name, header.SerializeToString(), upload.segments)


class Uploads:
    """Uploads one after another; every fifteen of them are a sum of their own, as in a round: a repeated upload would
    not be checked and stored again. A sum that has all of its own is discarded, as after a round. Sums are made in
    another process, for cryptography here would hold up the calls.
    """

    def __init__(self, clients: Clients, params: int) -> None:
        self._clients, self._params = clients, params
        self._sums: deque[Sum] = deque()
        self._turn = asyncio.Lock()
        self._making: asyncio.Task[None] | None = None
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    async def prepare(self, params: int, sums: int) -> None:
        """Make so many sums of this many integers, and forget those of another size."""
        self._params, self._sums = params, deque()
        await self._make(sums)

    async def following(self) -> tuple[str, Call]:
        """The call with the next upload; waits where none is ready."""
        one, upload = await self.take()
        return "aggregator.Upload", lambda: self._send(one, upload)

    async def take(self) -> tuple[Sum, Upload]:
        """The next upload and its sum, once; waits where none is ready."""
        async with self._turn:
            if not self._sums and self._making is None:
                self._making = asyncio.create_task(self._make(_AHEAD))
            if not self._sums and self._making is not None:
                await self._making
                self._making = None
            one = self._sums[0]
            upload = one.uploads.popleft()
            if not one.uploads:
                self._sums.popleft()
        return one, upload

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def _make(self, sums: int) -> None:
        loop, params = asyncio.get_running_loop(), self._params
        self._sums.extend([await loop.run_in_executor(self._pool, make_sum, params) for _ in range(sums)])

    async def _send(self, one: Sum, upload: Upload) -> int:
        async def messages() -> AsyncIterator[Any]:
            yield aggregator_pb2.UploadRequest(header=aggregator_pb2.UploadHeader.FromString(upload.header))
            for segment in upload.segments:
                *beginning, rest = chunks(segment, PART_BYTES)
                for part in beginning:
                    yield aggregator_pb2.UploadRequest(beginning=part)
                yield aggregator_pb2.UploadRequest(chunk=rest)

        if one.opened is None:
            one.opened = asyncio.create_task(self._open(one))
        await one.opened
        stub = await self._clients.of(upload.hospital, "aggregator")
        await call(stub.Upload, messages, timeout_s=60, patience_s=PATIENCE_S)
        one.unsent -= 1
        if one.unsent == 0:
            await self._discard(one)
        return one.upload_bytes

    async def _open(self, one: Sum) -> None:
        stub = await self._clients.of(SERVICE, "aggregator")
        await call(stub.OpenSum, aggregator_pb2.OpenSumRequest.FromString(one.opening), patience_s=PATIENCE_S)

    async def _discard(self, one: Sum) -> None:
        stub = await self._clients.of(SERVICE, "aggregator")
        attempt = round_pb2.Attempt.FromString(one.attempt)
        request = aggregator_pb2.DiscardSumRequest(request_id=new_id(), attempt=attempt)
        await call(stub.DiscardSum, request, patience_s=PATIENCE_S)
