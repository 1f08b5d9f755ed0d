"""The aggregator's gRPC surface: checks the form of requests, calls a use case, words the answer."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2 as pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as rpc
from fedmesh.common.v1 import round_pb2

from services.aggregator.domain.sums import AttemptId, Form, Opened, State, Sum
from services.aggregator.domain.uploads import UploadHeader
from services.aggregator.usecases import AggregatorUseCases
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import CHUNK_BYTES, PART_BYTES, chunks
from services.common.grpc.gate import caller
from services.common.ids import require_name, require_sha256, require_uuid
from services.secure_sum.opening import MaskKey, Opening
from services.secure_sum.statements import Signed

_STATES: Final = {
    State.OPEN: pb.SUM_STATE_OPEN,
    State.CLOSED: pb.SUM_STATE_CLOSED,
    State.COMPUTED: pb.SUM_STATE_COMPUTED,
}


class AggregatorServicer(rpc.AggregatorServiceServicer):
    """Who may call a method is decided before, by the policy beside it in the proto."""

    def __init__(self, usecases: AggregatorUseCases) -> None:
        self._usecases = usecases

    async def OpenSum(self, request: pb.OpenSumRequest, _context: Any) -> pb.OpenSumResponse:
        require_uuid(request.request_id, "request_id")
        signers = {require_name(item.hospital_id, "signers"): item.signing_key for item in request.signers}
        if len(signers) != len(request.signers):
            raise FedmeshError(Code.INVALID_ARGUMENT, "signers names a hospital twice", field="signers")
        opened = Opened(
            _form(request.form),
            tuple(require_name(name, "group") for name in request.group),
            signers,
            require_sha256(request.adverts_sha256, "adverts_sha256"),
        )
        expires_at = request.expires_at.ToDatetime(tzinfo=UTC)
        size = await self._usecases.open(_attempt(request.attempt), opened, expires_at)
        return pb.OpenSumResponse(upload_bytes=size)

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], _context: Any) -> pb.UploadResponse:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "header":
            raise FedmeshError(Code.CHUNK_STREAM_INVALID, "an upload begins with its header")
        hospital_id, header = caller().name, _header(first.header)
        counted = await self._usecases.upload(hospital_id, header, _segments(requests))
        return pb.UploadResponse(
            contribution=round_pb2.Contribution(
                hospital_id=hospital_id, ciphertext_sha256=header.sha256, upload_sha256=header.upload.sha256
            ),
            contributors=counted.contributors,
            already_counted=counted.already,
        )

    async def CloseSum(self, request: pb.CloseSumRequest, _context: Any) -> pb.CloseSumResponse:
        require_uuid(request.request_id, "request_id")
        closed = await self._usecases.close(_attempt(request.attempt), request.minimum_contributors)
        return pb.CloseSumResponse(contributions=_contributions(closed))

    async def ComputeSum(self, request: pb.ComputeSumRequest, _context: Any) -> pb.ComputeSumResponse:
        require_uuid(request.request_id, "request_id")
        keys = [
            MaskKey(item.hospital_id, item.position, item.mask_key, item.seed_commitment) for item in request.mask_keys
        ]
        opening = Opening(_seeds(request.opening.self_seeds), _seeds(request.opening.mask_seeds))
        sha256, size = await self._usecases.compute(_attempt(request.attempt), tuple(request.survivors), keys, opening)
        return pb.ComputeSumResponse(sum_sha256=sha256, size_bytes=size)

    async def GetSegments(self, request: pb.GetSegmentsRequest, _context: Any) -> AsyncIterator[pb.GetSegmentsResponse]:
        async for found in self._usecases.segments(caller().name, _attempt(request.attempt), request.index):
            for answer in _answers(found, in_parts=request.in_parts):
                yield answer

    async def DownloadSum(self, request: pb.DownloadSumRequest, _context: Any) -> AsyncIterator[pb.DownloadSumResponse]:
        async for segment in self._usecases.download(caller().name, _attempt(request.attempt)):
            for part in chunks(segment.content, PART_BYTES):
                yield pb.DownloadSumResponse(chunk=part)

    async def GetSum(self, request: pb.GetSumRequest, _context: Any) -> pb.GetSumResponse:
        held = await self._usecases.get(_attempt(request.attempt))
        return pb.GetSumResponse(
            state=_STATES[held.state],
            contributions=_contributions(held),
            sum_sha256="" if held.result is None else held.result[1],
        )

    async def DiscardSum(self, request: pb.DiscardSumRequest, _context: Any) -> pb.DiscardSumResponse:
        require_uuid(request.request_id, "request_id")
        await self._usecases.discard(_attempt(request.attempt))
        return pb.DiscardSumResponse()


async def _segments(requests: AsyncIterator[pb.UploadRequest]) -> AsyncIterator[bytes]:
    """The segments, put together from their parts."""
    parts: list[bytes] = []
    async for request in requests:
        kind = request.WhichOneof("part")
        if kind not in ("chunk", "beginning"):
            raise FedmeshError(Code.CHUNK_STREAM_INVALID, "after the header come segments only")
        parts.append(request.chunk if kind == "chunk" else request.beginning)
        if sum(map(len, parts)) > CHUNK_BYTES or not parts[-1]:
            raise FedmeshError(Code.CHUNK_STREAM_INVALID, "a segment has an empty part, or more than 1 MiB")
        if kind == "chunk":
            segment = b"".join(parts)
            parts.clear()
            yield segment


def _answers(found: Mapping[str, bytes], *, in_parts: bool) -> Iterator[pb.GetSegmentsResponse]:
    """Segments of uploads in one message, or a large one alone in several."""
    if not in_parts or len(found) != 1:
        answer = pb.GetSegmentsResponse()
        for name, segment in found.items():
            answer.segments.add(hospital_id=name, segment=segment)
        yield answer
        return
    for name, segment in found.items():
        for part in chunks(segment, PART_BYTES):
            answer = pb.GetSegmentsResponse()
            answer.segments.add(hospital_id=name, segment=part)
            yield answer


def _attempt(message: round_pb2.Attempt) -> AttemptId:
    require_uuid(message.job_id, "attempt.job_id")
    if message.round == 0 or message.attempt == 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "rounds and attempts count from 1", field="attempt")
    return AttemptId(message.job_id, message.round, message.attempt)


def _form(message: round_pb2.SumForm) -> Form:
    return Form(message.parameter_set, message.lanes, message.vector_length)


def _header(message: pb.UploadHeader) -> UploadHeader:
    require_uuid(message.request_id, "header.request_id")
    return UploadHeader(
        message.request_id,
        _attempt(message.attempt),
        _form(message.form),
        message.size_bytes,
        require_sha256(message.ciphertext_sha256, "header.ciphertext_sha256"),
        Signed(message.upload.hospital_id, message.upload.statement, message.upload.signature),
    )


def _seeds(seeds: Iterable[round_pb2.OpenedSeed]) -> dict[str, bytes]:
    """Twice the same hospital leaves one of two, and the wrong number of seeds is refused."""
    return {item.hospital_id: item.seed for item in seeds}


def _contributions(held: Sum) -> list[round_pb2.Contribution]:
    return [
        round_pb2.Contribution(
            hospital_id=name, ciphertext_sha256=counted.ciphertext_sha256, upload_sha256=counted.upload_sha256
        )
        for name, counted in sorted(held.contributions.items())
    ]
