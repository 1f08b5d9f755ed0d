"""Events for the audit log: how the registry words its own, and what it takes from other services."""

import re
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind, parse_identity
from services.registry.domain.entities import Event
from services.transparency.canonical import canonical_json, parse_json

MAX_BODY_BYTES: Final = 64 * 1024
MAX_EVENTS: Final = 500
RECORDED_FOR: Final = "recorded_for"
"""Key in an event's body: the service whose certificate handed the event to the registry."""

PROMOTION_TYPES: Final = frozenset(
    {
        "model.attested",
        "model.checked",
        "model.tagged",
        "model.rolled_back",
        "alias.moved",
        "promotion.proposed",
        "promotion.approved",
    }
)
"""What becomes of model versions."""

OWN_TYPES: Final = PROMOTION_TYPES | frozenset(
    {
        "hospital.registered",
        "hospital.status_changed",
        "hospital.strike",
        "hospital.suspended",
        "hospital.invited",
        "membership.proposed",
        "membership.approved",
        "hospital.enrolled",
        "certificate.renewed",
        "certificates.revoked",
        "enrolment.refused",
        "roster.published",
        "epoch.published",
        "plan.proposed",
        "plan.approved",
        "job.created",
        "job.ended",
        "attempt.opened",
        "blob.stored",
        "survivors.stored",
        "round.committed",
        "round.burnt",
        "ledger.reported",
        "ledger.differs",
        "ledger.recovered",
    }
)
"""Facts that only the registry can state; nobody else may report them."""

_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_SUBJECT: Final = re.compile(r"[a-z][a-z0-9_-]*/[A-Za-z0-9._:/-]+")


def event(event_type: str, at: datetime, actor: Identity, subject: str, **body: Any) -> Event:
    """An event of the registry's own. `actor` is who called; it comes from the certificate."""
    return Event(uuid4(), event_type, at, str(actor), subject, canonical_json(body).decode())


def reported_event(
    event_id: UUID, event_type: str, at: datetime, actor: str, subject: str, body_json: str, source: Identity
) -> Event:
    """An event that another service reports, marked with that service.

    A service may speak for itself and for the hospitals that call it, not for operators, other services or the
    registry.

    Raises: FedmeshError(INVALID_ARGUMENT | TOO_LARGE) for a malformed event, (PERMISSION_DENIED) for a forged one.
    """
    if len(event_type) > 63 or not _TYPE.fullmatch(event_type):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"event type {event_type[:80]!r} is not a name like round.sealed")
    if len(subject) > 200 or not _SUBJECT.fullmatch(subject):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"event subject {subject[:80]!r} is not a path like job/<id>")
    if event_type in OWN_TYPES:
        raise FedmeshError(Code.PERMISSION_DENIED, f"only the registry states {event_type}")
    _require_honest_actor(actor, source)
    body = _parse_body(body_json)
    if body.setdefault(RECORDED_FOR, str(source)) != str(source):
        raise FedmeshError(Code.PERMISSION_DENIED, f"the event's {RECORDED_FOR} names another service")
    text = _write_body(body)
    return Event(event_id, event_type, at, actor, subject, text)


def _write_body(body: dict[str, Any]) -> str:
    try:
        # One level of nesting is the log's own.
        text = canonical_json({"": body}).decode()[len('{"":') : -1]
    except ValueError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the event's body is not usable: {error}") from error
    if len(text) + len('{"":}') > MAX_BODY_BYTES:
        raise FedmeshError(Code.TOO_LARGE, f"an event's body is {MAX_BODY_BYTES} bytes at most")
    return text


def _require_honest_actor(actor: str, source: Identity) -> None:
    try:
        named = parse_identity(actor)
    except FedmeshError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the event's actor is not a SPIFFE id of the consortium") from error
    speaks_for_hospital = named.kind is Kind.HOSPITAL and named.consortium == source.consortium
    if named != source and not speaks_for_hospital:
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"{source.kind.value} {source.name} cannot report what {actor} did", actor=actor
        )


def _parse_body(body_json: str) -> dict[str, Any]:
    if len(body_json) > MAX_BODY_BYTES:
        raise FedmeshError(Code.TOO_LARGE, f"an event's body is {MAX_BODY_BYTES} bytes at most")
    try:
        return parse_json(body_json or "{}")
    except ValueError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the event's body is not a usable JSON object: {error}") from error
