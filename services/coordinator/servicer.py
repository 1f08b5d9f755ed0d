"""The coordinator's gRPC surface: checks the form of requests, calls a use case, words the answer."""

import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any, Final

from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as rpc

from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.identity import Kind as Caller
from services.common.ids import require_sha256, require_uuid
from services.coordinator.domain.attempt import AttemptId, Decline, Phase, Reports, Seen, State, Upload, Verdict
from services.coordinator.ports import Observation
from services.coordinator.usecases import CoordinatorUseCases, Sender
from services.coordinator.wire import parse_signed, timestamp_ms, wire_attempt
from services.secure_sum.statements import MAX_MEMBERS, SIGNATURE_BYTES, Signed

_CURSOR: Final = re.compile(r"^\d{1,15}-\d{1,9}$")
_FINGERPRINT: Final = re.compile(r"^([0-9a-f]{16})?$")
_SLUG: Final = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
_MAX_REASON: Final = 500
_MAX_METRICS: Final = 4096


class CoordinatorServicer(rpc.CoordinatorServiceServicer):
    """Who may call a method is decided before, by the policy beside it in the proto."""

    def __init__(self, usecases: CoordinatorUseCases) -> None:
        self._usecases = usecases

    async def WatchTasks(self, request: pb.WatchTasksRequest, _context: Any) -> AsyncIterator[pb.WatchTasksResponse]:
        cursor = _matching(request.cursor, _CURSOR, "cursor") if request.cursor else ""
        fingerprint = _matching(request.group_key_fingerprint, _FINGERPRINT, "group_key_fingerprint")
        async for delivery in self._usecases.watch(caller().name, cursor, fingerprint):
            task = pb.Task.FromString(delivery.task) if delivery.task is not None else None
            yield pb.WatchTasksResponse(cursor=delivery.cursor, task=task)

    async def ReportReady(self, request: pb.ReportReadyRequest, _context: Any) -> pb.ReportReadyResponse:
        advert = _signed(request.advert)
        phase = await self._usecases.ready(_sender("ReportReady", request), request.base_version, advert)
        return pb.ReportReadyResponse(phase=_phase(phase))

    async def SubmitShares(self, request: pb.SubmitSharesRequest, _context: Any) -> pb.SubmitSharesResponse:
        if not 0 < len(request.shares) <= MAX_MEMBERS:
            raise FedmeshError(Code.INVALID_ARGUMENT, "shares must be one for every other member", field="shares")
        shares = [_signed(item) for item in request.shares]
        phase = await self._usecases.shares(_sender("SubmitShares", request), shares)
        return pb.SubmitSharesResponse(phase=_phase(phase))

    async def ReportUpload(self, request: pb.ReportUploadRequest, _context: Any) -> pb.ReportUploadResponse:
        upload = Upload(require_sha256(request.ciphertext_sha256, "ciphertext_sha256"), request.size_bytes)
        phase = await self._usecases.uploaded(_sender("ReportUpload", request), upload, _signed(request.upload))
        return pb.ReportUploadResponse(phase=_phase(phase))

    async def ConfirmSurvivors(self, request: pb.ConfirmSurvivorsRequest, _context: Any) -> pb.ConfirmSurvivorsResponse:
        survivors_sha256 = require_sha256(request.survivors_sha256, "survivors_sha256")
        signature = _signature(request.signature)
        phase = await self._usecases.confirm(_sender("ConfirmSurvivors", request), survivors_sha256, signature)
        return pb.ConfirmSurvivorsResponse(phase=_phase(phase))

    async def SubmitReveal(self, request: pb.SubmitRevealRequest, _context: Any) -> pb.SubmitRevealResponse:
        phase = await self._usecases.reveal(_sender("SubmitReveal", request), _signed(request.reveal))
        return pb.SubmitRevealResponse(phase=_phase(phase))

    async def SubmitDigest(self, request: pb.SubmitDigestRequest, _context: Any) -> pb.SubmitDigestResponse:
        if len(request.digest) != 32:
            raise FedmeshError(Code.INVALID_ARGUMENT, "digest must be 32 bytes", field="digest")
        sum_sha256 = require_sha256(request.sum_sha256, "sum_sha256")
        state_sha256 = require_sha256(request.next_state_sha256, "next_state_sha256")
        seen = Seen(request.digest.hex(), state_sha256, _metrics(request.metrics_json))
        sender, signed = _sender("SubmitDigest", request), _signed(request.signed)
        return pb.SubmitDigestResponse(phase=_phase(await self._usecases.digest(sender, sum_sha256, seen, signed)))

    async def SubmitState(self, request: pb.SubmitStateRequest, _context: Any) -> pb.SubmitStateResponse:
        state = State(require_sha256(request.state_sha256, "state_sha256"), _metrics(request.metrics_json))
        phase = await self._usecases.state(_sender("SubmitState", request), state)
        return pb.SubmitStateResponse(phase=_phase(phase))

    async def AttestState(self, request: pb.AttestStateRequest, _context: Any) -> pb.AttestStateResponse:
        verdict = Verdict(request.agrees, _text(request.reason, "reason"))
        sha256 = require_sha256(request.state_sha256, "state_sha256")
        phase = await self._usecases.attest(_sender("AttestState", request), sha256, verdict)
        return pb.AttestStateResponse(phase=_phase(phase))

    async def DeclineJob(self, request: pb.DeclineJobRequest, _context: Any) -> pb.DeclineJobResponse:
        require_uuid(request.request_id, "request_id")
        require_uuid(request.job_id, "job_id")
        decline = Decline(_matching(request.code, _SLUG, "code"), _text(request.reason, "reason"))
        await self._usecases.decline(caller().name, request.job_id, decline)
        return pb.DeclineJobResponse()

    async def GetRound(self, request: pb.GetRoundRequest, _context: Any) -> pb.GetRoundResponse:
        require_uuid(request.job_id, "job_id")
        identity = caller()
        asking = identity.name if identity.kind is Caller.HOSPITAL else None
        return _round(await self._usecases.round(request.job_id, asking))

    async def ListParticipants(
        self, _request: pb.ListParticipantsRequest, _context: Any
    ) -> pb.ListParticipantsResponse:
        found = await self._usecases.participants()
        return pb.ListParticipantsResponse(
            participants=[
                pb.Participant(
                    hospital_id=name,
                    connected_at=timestamp_ms(details["since_ms"]),
                    group_key_fingerprint=details["fingerprint"],
                )
                for name, details in sorted(found.items())
            ]
        )


def _phase(phase: Phase) -> pb.Phase.ValueType:
    return pb.Phase.ValueType(phase)


def _sender(method: str, request: Any) -> Sender:
    """Who reports, and about which attempt; every report has a request id too."""
    require_uuid(request.request_id, "request_id")
    message: round_pb2.Attempt = request.attempt
    require_uuid(message.job_id, "attempt.job_id")
    if message.round == 0 or message.attempt == 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "rounds and attempts count from 1", field="attempt")
    attempt = AttemptId(message.job_id, message.round, message.attempt)
    return Sender(caller().name, attempt, method, request.request_id)


def _signed(message: round_pb2.Signed) -> Signed:
    if not message.statement:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the report lacks its signed statement")
    _signature(message.signature)
    return parse_signed(message)


def _signature(signature: bytes) -> bytes:
    if len(signature) != SIGNATURE_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a signature has {SIGNATURE_BYTES} bytes", field="signature")
    return signature


def _matching(value: str, pattern: re.Pattern[str], field: str) -> str:
    if not pattern.match(value):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} is not well-formed", field=field)
    return value


def _text(value: str, field: str) -> str:
    if len(value) > _MAX_REASON:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} has {_MAX_REASON} characters at most", field=field)
    return value


def _metrics(text: str) -> str:
    """Metrics as the registry takes them: a JSON object of finite numbers, or nothing."""
    try:
        values = json.loads(text) if text else {}
        sound = isinstance(values, dict) and all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            for value in values.values()
        )
    except (ValueError, RecursionError):
        sound = False
    if not sound or len(text.encode()) > _MAX_METRICS:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"metrics_json must be a JSON object of numbers, {_MAX_METRICS} bytes at most"
        )
    return text


def _round(seen: Observation) -> pb.GetRoundResponse:
    attempt = seen.attempt
    if attempt is None:
        raise FedmeshError(Code.NOT_FOUND, "no round is known here")
    return pb.GetRoundResponse(
        attempt=wire_attempt(attempt.id),
        phase=_phase(attempt.phase),
        base_version=attempt.base_version,
        progress=[_progress(name, seen) for name in attempt.cohort],
        deadline=timestamp_ms(attempt.deadline_ms),
        reason=seen.waiting or attempt.reason or attempt.trouble,
    )


def _progress(hospital_id: str, seen: Observation) -> pb.HospitalProgress:
    declined = seen.declined.get(hospital_id)
    upload = seen.reports.uploads.get(hospital_id)
    finished = _finished(hospital_id, seen.reports)
    return pb.HospitalProgress(
        hospital_id=hospital_id,
        connected=hospital_id in seen.connected,
        finished=_phase(finished) if finished is not None else pb.PHASE_UNSPECIFIED,
        uploaded_bytes=upload.size_bytes if upload is not None else 0,
        declined=declined is not None,
        decline_reason=declined.reason if declined is not None else "",
    )


def _finished(hospital_id: str, reports: Reports) -> Phase | None:
    """The last phase that a hospital has finished."""
    done = {
        Phase.ATTEST: reports.verdicts,
        Phase.FINALIZE: reports.states,
        Phase.AGREE: reports.digests,
        Phase.UNMASK: reports.reveals,
        Phase.CONFIRM: reports.confirmations,
        Phase.UPLOAD: reports.uploads,
        Phase.SHARE: reports.shares,
        Phase.TRAINING: reports.ready,
    }
    return next((phase for phase, names in done.items() if hospital_id in names), None)
