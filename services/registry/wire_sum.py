"""Between protobuf messages and the registry's own types: rosters, key epochs, survivors, strikes."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Final

from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_name, require_uuid
from services.registry import wire
from services.registry.domain import entities
from services.secure_sum.statements import MAX_MEMBERS, SIGNATURE_BYTES, Signed

MAX_DETAILS: Final = 4 * 1024 * 1024
_MAX_NUMBER: Final = 2**31 - 1
_SLUG: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")


def read_signatures(signatures: Iterable[round_pb2.Signature], field: str) -> dict[str, bytes]:
    """Signatures by hospital.

    Raises: FedmeshError(INVALID_ARGUMENT) for too many, two of one hospital, or one that is not 64 bytes.
    """
    found: dict[str, bytes] = {}
    for item in signatures:
        name = require_name(item.hospital_id, f"{field}.hospital_id")
        if name in found or len(item.signature) != SIGNATURE_BYTES or len(found) == MAX_MEMBERS:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"{field} are one signature of {SIGNATURE_BYTES} bytes for each of {MAX_MEMBERS} hospitals at most",
                field=field,
            )
        found[name] = item.signature
    return found


def read_signed(message: round_pb2.Signed, field: str) -> Signed:
    """Raises: FedmeshError(INVALID_ARGUMENT) for a malformed hospital id."""
    return Signed(require_name(message.hospital_id, f"{field}.hospital_id"), message.statement, message.signature)


def read_survivors(message: pb.Survivors) -> Callable[[datetime], entities.SurvivorList]:
    """The survivors, still without the time of their storing.

    Raises: FedmeshError(INVALID_ARGUMENT | TOO_LARGE).
    """
    job_id = require_uuid(message.attempt.job_id, "survivors.attempt.job_id")
    _require_number(message.attempt)
    if len(message.details) > MAX_DETAILS:
        raise FedmeshError(Code.TOO_LARGE, f"details have {len(message.details)} bytes, {MAX_DETAILS} at most")
    confirmations = read_signatures(message.confirmations, "survivors.confirmations")
    return lambda at: entities.SurvivorList(
        job_id=job_id,
        round=message.attempt.round,
        attempt=message.attempt.attempt,
        statement=message.statement,
        confirmations=confirmations,
        details=message.details,
        stored_at=at,
    )


def read_strike(request: pb.RecordStrikeRequest, caller: Identity) -> Callable[[datetime], entities.Strike]:
    """The strike, still without its time.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the field that is malformed.
    """
    if not _SLUG.fullmatch(request.code):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "code is the slug of an error, such as ciphertext-invalid", field="code"
        )
    attempt = None
    if request.HasField("attempt"):
        _require_number(request.attempt)
        job_id = require_uuid(request.attempt.job_id, "attempt.job_id")
        attempt = (job_id, request.attempt.round, request.attempt.attempt)
    hospital_id = require_name(request.hospital_id, "hospital_id")
    request_id = require_uuid(request.request_id, "request_id")
    reason = wire.require_text(request.reason, "reason", 500)
    return lambda at: entities.Strike(hospital_id, request_id, request.code, reason, attempt, str(caller), at)


def _require_number(attempt: round_pb2.Attempt) -> None:
    if not (1 <= attempt.round <= _MAX_NUMBER and 1 <= attempt.attempt <= _MAX_NUMBER):
        raise FedmeshError(Code.INVALID_ARGUMENT, "round and attempt count from 1", field="attempt")


def signatures(found: Mapping[str, bytes]) -> list[round_pb2.Signature]:
    return [round_pb2.Signature(hospital_id=name, signature=found[name]) for name in sorted(found)]


def roster(value: entities.PublishedRoster) -> pb.Roster:
    return pb.Roster(statement=value.statement, signatures=signatures(value.signatures), sha256=value.roster.sha256)


def signed(value: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=value.hospital_id, statement=value.statement, signature=value.signature)


def epoch_standing(value: entities.EpochStanding) -> pb.GetEpochResponse:
    return pb.GetEpochResponse(
        epoch=None if value.found is None else signed(value.found.signed),
        due=value.due,
        due_for_s=value.due_for_s,
        roster_sha256=value.present_roster,
        barred=value.barred,
        public_key=value.public_key,
    )


def opened_attempt(value: entities.OpenedAttempt) -> pb.OpenAttemptResponse:
    return pb.OpenAttemptResponse(
        attempt=wire.attempt(value.job_id, value.round, value.attempt),
        roster_sha256=value.roster_sha256,
        epoch=value.epoch,
    )


def survivors(value: entities.SurvivorList | None) -> pb.GetSurvivorsResponse:
    if value is None:
        return pb.GetSurvivorsResponse()
    return pb.GetSurvivorsResponse(
        survivors=pb.Survivors(
            attempt=wire.attempt(value.job_id, value.round, value.attempt),
            statement=value.statement,
            confirmations=signatures(value.confirmations),
            details=value.details,
            stored_at=wire.timestamp(value.stored_at),
        )
    )
