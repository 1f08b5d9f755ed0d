"""What an event may be, and the bytes that the log holds of it.

A leaf is canonical JSON with the keys `actor`, `body`, `event_id`, `occurred_at` (RFC 3339, UTC, nine decimals),
`source` (the SPIFFE id in the certificate of the service that appended it), `subject` and `type`. It holds no time of
recording: the same event from the same service gives the same bytes whenever it is sent, which is what makes appending
idempotent.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_uuid
from services.transparency.canonical import MAX_DEPTH, canonical_json, parse_canonical, parse_json, spell

MAX_BODY_BYTES: Final = 64 * 1024
MAX_EVENTS: Final = 500

_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_NAME: Final = re.compile(r"[A-Za-z0-9._:/@+-]+")
_MAX_TYPE: Final = 100
# Only the registry states these, and it gives them a list of contributions.
_ROUND_TYPES: Final = frozenset({"round.committed", "round.burnt"})
# This too; it gives it the job's cohort.
# Of versions of a job; their bodies list the hospitals that take part in it.
_VERSION_TYPES: Final = frozenset({"model.attested", "alias.moved"})
_MAX_NAME: Final = 300
_PUNCTUATION: Final = re.compile(r"[^a-z0-9]")
# A safeguard against mistakes, not against intent: keys under which somebody's data would be found. Compared without
# case, dashes and underscores.
_PERSONAL: Final = frozenset(
    {
        "patient",
        "patientid",
        "patientnbr",
        "patientnumber",
        "patientname",
        "encounter",
        "encounterid",
        "name",
        "firstname",
        "lastname",
        "fullname",
        "surname",
        "givenname",
        "ssn",
        "socialsecuritynumber",
        "dob",
        "dateofbirth",
        "birthdate",
        "mrn",
        "medicalrecordnumber",
        "email",
        "phone",
        "phonenumber",
        "homeaddress",
        "streetaddress",
    }
)


@dataclass(frozen=True)
class Event:
    """An event as it was sent. `occurred_at` is RFC 3339 text in UTC."""

    event_id: str
    type: str
    occurred_at: str
    actor: str
    subject: str
    body_json: str


@dataclass(frozen=True)
class Leaf:
    """A checked event, ready for the tree. attempt: the job, round and attempt that it is about, if it says so."""

    event_id: UUID
    content: bytes
    attempt: tuple[str, int, int] | None = None


def make_leaf(event: Event, source: Identity) -> Leaf:
    """Check an event and make its leaf.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the event and what is wrong with it.
    """
    event_id = require_uuid(event.event_id, "event_id")
    if len(event.type) > _MAX_TYPE or not _TYPE.fullmatch(event.type):
        raise _invalid(event, "type must be a dotted lower-case name such as round.committed")
    for field, value in (("actor", event.actor), ("subject", event.subject)):
        if len(value) > _MAX_NAME or not _NAME.fullmatch(value):
            raise _invalid(event, f"{field} must be 1 to {_MAX_NAME} letters, digits and . _ : / @ + -")
    body, spelled = _parse_body(event)
    after = canonical_json(
        {
            "event_id": event.event_id,
            "occurred_at": event.occurred_at,
            "source": str(source),
            "subject": event.subject,
            "type": event.type,
        }
    )
    # Put together, in the order of the keys, instead of spelling the body twice. A name needs no escapes.
    content = b'{"actor":"%b","body":%b,%b' % (event.actor.encode("ascii"), spelled, after[1:])
    return Leaf(event_id, content, _attempt(event.subject, body))


def concerns(leaf: bytes, hospital_id: str) -> bool:
    """Whether a leaf tells of a round that lists a contribution of this hospital, or of a version of a job that it
    takes part in: its statement, or an alias that moved to it."""
    event = parse_canonical(leaf)
    if event.get("type") in _VERSION_TYPES:
        return hospital_id in event["body"].get("hospitals", [])
    if event.get("type") not in _ROUND_TYPES:
        return False
    listed = event["body"].get("contributions", [])
    return any(isinstance(item, dict) and item.get("hospital_id") == hospital_id for item in listed)


def _attempt(subject: str, body: dict[str, Any]) -> tuple[str, int, int] | None:
    kind, _, job_id = subject.partition("/")
    numbers = body.get("round"), body.get("attempt")
    match numbers:
        case (int(round_number), int(attempt)) if kind == "job":
            return job_id, round_number, attempt
    return None


def _parse_body(event: Event) -> tuple[dict[str, Any], bytes]:
    """The body, and its canonical spelling."""
    try:
        # The spelling in the log may be longer than the one that was sent; both are held to the limit. One level of
        # nesting is kept for the leaf around the body.
        body = parse_json(event.body_json, MAX_DEPTH - 1) if len(event.body_json) <= MAX_BODY_BYTES else None
        spelled = b"" if body is None else spell(body)
        if body is None or len(spelled) > MAX_BODY_BYTES:
            raise _invalid(event, f"body_json must have at most {MAX_BODY_BYTES} bytes")
    except ValueError as error:
        raise _invalid(event, f"body_json must be a JSON object: {error}") from None
    for key in _keys(body):
        if _PUNCTUATION.sub("", key.lower()) in _PERSONAL:
            raise _invalid(event, f"body_json has the key {key[:80]!r}: the log takes no data about persons")
    return body, spelled


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _invalid(event: Event, problem: str) -> FedmeshError:
    return FedmeshError(Code.INVALID_ARGUMENT, f"event {event.event_id}: {problem}", event_id=event.event_id)
