"""Between protobuf messages and the registry's own types."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_name, require_sha256, require_uuid
from services.registry.domain import entities
from services.registry.domain.events import MAX_EVENTS, reported_event
from services.registry.usecases.ports import Command

T = TypeVar("T")

HOSPITAL_STATUS: Final = {
    pb.HOSPITAL_STATUS_ACTIVE: entities.HospitalStatus.ACTIVE,
    pb.HOSPITAL_STATUS_SUSPENDED: entities.HospitalStatus.SUSPENDED,
    pb.HOSPITAL_STATUS_REMOVED: entities.HospitalStatus.REMOVED,
}
JOB_STATUS: Final = {
    pb.JOB_STATUS_RUNNING: entities.JobStatus.RUNNING,
    pb.JOB_STATUS_COMPLETED: entities.JobStatus.COMPLETED,
    pb.JOB_STATUS_FAILED: entities.JobStatus.FAILED,
    pb.JOB_STATUS_CANCELLED: entities.JobStatus.CANCELLED,
}
_HOSPITAL_STATUS_OUT: Final = {ours: theirs for theirs, ours in HOSPITAL_STATUS.items()}
_JOB_STATUS_OUT: Final = {ours: theirs for theirs, ours in JOB_STATUS.items()}
_PLAN_STATUS_OUT: Final = {
    entities.PlanStatus.PROPOSED: pb.PLAN_STATUS_PROPOSED,
    entities.PlanStatus.APPROVED: pb.PLAN_STATUS_APPROVED,
}
# Room for names and digests of the largest cohort; responses stay below gRPC's message limit of 1 MiB.
_PAGE_BYTES: Final = 900_000
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_BIGINT: Final = 2**63 - 1

# --- requests


def command(request: Any, caller: Identity, method: str, encode: Callable[[T], Message]) -> Command[T]:
    """The idempotency key of a mutation; equal messages have equal digests.

    Raises: FedmeshError(INVALID_ARGUMENT) when `request_id` is not a UUID.
    """
    content = request.SerializeToString(deterministic=True)
    return Command(
        request_id=require_uuid(request.request_id, "request_id"),
        caller=caller,
        method=method,
        content_sha256=hashlib.sha256(content).digest(),
        encode=lambda answer: encode(answer).SerializeToString(),
    )


def require_text(value: str, field: str, limit: int) -> str:
    """Raises: FedmeshError(INVALID_ARGUMENT) for text that is too long or has control characters besides newlines."""
    if len(value) > limit or _CONTROL.search(value):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"{field} is at most {limit} characters without control characters", field=field
        )
    return value


def require_choice(value: int, choices: dict[Any, T], field: str) -> T:
    """Raises: FedmeshError(INVALID_ARGUMENT) for a value outside the choices."""
    if value not in choices:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} must be set to one of its named values", field=field)
    return choices[value]


def require_time(value: Timestamp, present: bool, field: str) -> datetime:
    """Raises: FedmeshError(INVALID_ARGUMENT) for a time that is missing or out of range."""
    try:
        if present:
            return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        pass
    raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} must be a time in UTC", field=field)


def page_size(value: int) -> int:
    """Raises: FedmeshError(INVALID_ARGUMENT) above 500."""
    if value > entities.MAX_PAGE:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"page_size is {entities.MAX_PAGE} at most", field="page_size")
    return value or entities.DEFAULT_PAGE


def read_page_token(token: str) -> int | None:
    """The key that a page goes on below; None for the first page.

    Raises: FedmeshError(INVALID_ARGUMENT).
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != 8 or raw[0] & 0x80:
        raise FedmeshError(Code.INVALID_ARGUMENT, "page_token is not one that the registry gave", field="page_token")
    return int.from_bytes(raw, "big")


def page_token(before: int | None) -> str:
    return "" if before is None else base64.urlsafe_b64encode(before.to_bytes(8, "big")).decode()


def read_round(request: pb.CommitRoundRequest) -> entities.Round:
    """The round to commit. Of a burnt one, sum, state and finalizer may be empty.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the field that is malformed.
    """
    told = request.round
    if told.attempt.round != told.version:
        raise FedmeshError(Code.INVALID_ARGUMENT, "attempt.round must equal version", field="version")
    if told.upload_bytes > _MAX_BIGINT:
        raise FedmeshError(Code.INVALID_ARGUMENT, "upload_bytes is out of range", field="upload_bytes")
    if told.burnt_reason and not told.burnt:
        raise FedmeshError(Code.INVALID_ARGUMENT, "burnt_reason is for burnt rounds", field="burnt_reason")
    return entities.Round(
        job_id=require_uuid(told.attempt.job_id, "attempt.job_id"),
        version=told.version,
        attempt=told.attempt.attempt,
        contributions=tuple(
            entities.Contribution(
                require_name(item.hospital_id, "contributions.hospital_id"),
                require_sha256(item.ciphertext_sha256, "contributions.ciphertext_sha256"),
                _require_age(item.age, told.version),
            )
            for item in told.contributions
        ),
        sum_sha256=_made(told.burnt, told.sum_sha256, "sum_sha256", require_sha256),
        agreeing=tuple(require_name(name, "agreeing") for name in told.agreeing),
        dissenting=tuple(require_name(name, "dissenting") for name in told.dissenting),
        finalizer=_made(told.burnt, told.finalizer, "finalizer", require_name),
        attesting=tuple(require_name(name, "attesting") for name in told.attesting),
        state_sha256=_made(told.burnt, told.state_sha256, "state_sha256", require_sha256),
        metrics_json=told.metrics_json,
        upload_bytes=told.upload_bytes,
        sealed_at=require_time(told.sealed_at, told.HasField("sealed_at"), "sealed_at"),
        content_sha256=_round_digest(told),
        survivors_sha256=require_sha256(told.survivors_sha256, "survivors_sha256"),
        burnt=told.burnt,
        burnt_reason=require_text(told.burnt_reason, "burnt_reason", 500),
    )


def _require_age(age: int, version: int) -> int:
    if age >= version:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"no contribution to version {version} is of age {age}", field="contributions.age"
        )
    return age


def _made(burnt: bool, value: str, field: str, require: Callable[[str, str], str]) -> str:
    return "" if burnt and not value else require(value, field)


def _round_digest(told: pb.CommittedRound) -> bytes:
    content = pb.CommittedRound()
    content.CopyFrom(told)
    content.ClearField("committed_at")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def read_events(events: Sequence[audit_pb2.Event], source: Identity) -> list[entities.Event]:
    """The events that another service reports.

    Raises: FedmeshError(INVALID_ARGUMENT | TOO_LARGE | PERMISSION_DENIED).
    """
    if not 1 <= len(events) <= MAX_EVENTS:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"1 to {MAX_EVENTS} events a call", field="events")
    return [
        reported_event(
            require_uuid(item.event_id, "event_id"),
            item.type,
            require_time(item.occurred_at, item.HasField("occurred_at"), "occurred_at"),
            item.actor,
            item.subject,
            item.body_json,
            source,
        )
        for item in events
    ]


def read_header(part: pb.UploadBlobRequest) -> entities.BlobHeader:
    """The header that opens an upload.

    Raises: FedmeshError(CHUNK_STREAM_INVALID) when the stream opens with something else, (INVALID_ARGUMENT).
    """
    if part.WhichOneof("part") != "header":
        raise FedmeshError(Code.CHUNK_STREAM_INVALID, "an upload begins with its header")
    header = part.header
    require_uuid(header.request_id, "header.request_id")
    if header.size_bytes == 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "header.size_bytes must be at least 1", field="size_bytes")
    return entities.BlobHeader(
        job_id=require_uuid(header.job_id, "header.job_id"),
        sha256=require_sha256(header.sha256, "header.sha256"),
        size_bytes=header.size_bytes,
    )


def read_chunk(part: pb.UploadBlobRequest) -> bytes:
    """A chunk behind the header.

    Raises: FedmeshError(CHUNK_STREAM_INVALID) for a second header, or a chunk that is empty or larger than 1 MiB.
    """
    if part.WhichOneof("part") != "chunk":
        raise FedmeshError(Code.CHUNK_STREAM_INVALID, "only chunks may follow an upload's header")
    if not 1 <= len(part.chunk) <= 1024 * 1024:
        raise FedmeshError(Code.CHUNK_STREAM_INVALID, "a chunk has 1 byte to 1 MiB")
    return part.chunk


# --- answers


def timestamp(value: datetime | None) -> Timestamp | None:
    """A time with its zone, as protobuf has it."""
    return None if value is None else Timestamp(**within(value))


def within(value: datetime) -> dict[str, int]:
    """As `timestamp`, for a field of a message that is being made. What is given as a mapping is filled in where it
    belongs; a message is serialized and parsed again to get there, which takes longer than all else of a page.
    """
    # As `Timestamp.FromDatetime`, in a fifth of its time: a page has a hundred of them.
    since = value - _EPOCH
    return {"seconds": since.days * 86_400 + since.seconds, "nanos": since.microseconds * 1000}


def hospital(value: entities.Hospital) -> pb.Hospital:
    return pb.Hospital(
        hospital_id=value.hospital_id,
        display_name=value.display_name,
        status=_HOSPITAL_STATUS_OUT[value.status],
        created_at=timestamp(value.created_at),
        strikes=value.strikes,
        certificates_from=None if value.certificates_from is None else timestamp(value.certificates_from),
        certificate_not_after=None if value.certificate_not_after is None else timestamp(value.certificate_not_after),
    )


def plan(value: entities.Plan) -> pb.Plan:
    return pb.Plan(
        plan_id=value.plan_id,
        name=value.name,
        manifest=value.manifest,
        status=_PLAN_STATUS_OUT[value.status],
        proposed_by=value.proposed_by,
        approved_by=value.approved_by or "",
        created_at=timestamp(value.created_at),
    )


def job(value: entities.Job) -> pb.Job:
    return pb.Job(
        job_id=str(value.job_id),
        plan_id=value.plan_id,
        plan_name=value.plan_name,
        hospital_ids=value.hospital_ids,
        status=_JOB_STATUS_OUT[value.status],
        reason=value.reason,
        rounds=value.rounds,
        version=value.version,
        state_sha256=value.state_sha256,
        created_at=timestamp(value.created_at),
        ended_at=timestamp(value.ended_at),
        roster_sha256=value.roster_sha256,
    )


def attempt(job_id: UUID, round_number: int, number: int) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=str(job_id), round=round_number, attempt=number)


def committed_round(value: entities.CommittedRound) -> pb.CommittedRound:
    return pb.CommittedRound(**_round(value, str(value.round.job_id)))


def _round(value: entities.CommittedRound, job_id: str) -> dict[str, Any]:
    """The fields of a committed round."""
    told = value.round
    return {
        "attempt": {"job_id": job_id, "round": told.version, "attempt": told.attempt},
        "version": told.version,
        "contributions": [
            {"hospital_id": item.hospital_id, "ciphertext_sha256": item.ciphertext_sha256, "age": item.age}
            for item in told.contributions
        ],
        "sum_sha256": told.sum_sha256,
        "agreeing": told.agreeing,
        "dissenting": told.dissenting,
        "finalizer": told.finalizer,
        "attesting": told.attesting,
        "state_sha256": told.state_sha256,
        "metrics_json": told.metrics_json,
        "sealed_at": within(told.sealed_at),
        "committed_at": within(value.committed_at),
        "upload_bytes": told.upload_bytes,
        "burnt": told.burnt,
        "burnt_reason": told.burnt_reason,
        "survivors_sha256": told.survivors_sha256,
    }


def model_version(value: entities.ModelVersion) -> pb.ModelVersion:
    told = value.committed.round
    job_id = str(told.job_id)
    fields: dict[str, Any] = {
        "job_id": job_id,
        "version": told.version,
        "plan_id": value.plan_id,
        "plan_name": value.plan_name,
        "state_sha256": told.state_sha256,
        "size_bytes": value.size_bytes,
        "round": _round(value.committed, job_id),
        "private": value.private,
        "final": value.final,
    }
    return pb.ModelVersion(**fields)


def metric(value: entities.Metric) -> pb.Metric:
    return pb.Metric(
        job_id=str(value.job_id),
        version=value.version,
        name=value.name,
        value=value.value,
        recorded_at=timestamp(value.recorded_at),
    )


MessageT = TypeVar("MessageT", bound=Message)


def fitting(messages: Sequence[MessageT]) -> Sequence[MessageT]:
    """As many of the first messages as fit in one response; at least one."""
    total = 0
    for number, message in enumerate(messages):
        total += message.ByteSize() + 8
        if total > _PAGE_BYTES and number > 0:
            return messages[:number]
    return messages
