"""An attempt's record to and from the fields of a Redis hash."""

import json
from collections.abc import Mapping

from services.coordinator.domain.attempt import (
    ACCEPTS,
    Attempt,
    Decline,
    Kind,
    Reports,
    Seen,
    State,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import quorum
from services.coordinator.domain.stored import attempt_json


def record_fields(attempt: Attempt) -> dict[str, str | int]:
    """The record's fields: the attempt as JSON, and apart from it what the scripts look at."""
    kind = ACCEPTS.get(attempt.phase)
    return {
        "core": attempt_json(attempt),
        "round": attempt.round,
        "attempt": attempt.attempt,
        "phase": int(attempt.phase),
        "accepts": kind.value if kind is not None else "",
        "members": _names(attempt.members),
        "cohort": _names(attempt.cohort),
        "guard": attempt.guard,
        "quorum": quorum(attempt) if kind is not None else 0,
    }


def _names(hospital_ids: tuple[str, ...]) -> str:
    return f" {' '.join(hospital_ids)} "


def parse_reports(record: Mapping[bytes, bytes]) -> Reports:
    values: dict[Kind, dict[str, str]] = {kind: {} for kind in Kind}
    reached: dict[Kind, int] = {}
    for raw, value in record.items():
        mark, _, rest = raw.decode().partition(":")
        kind, _, hospital_id = rest.partition(":")
        if mark == "r":
            values[Kind(kind)][hospital_id] = value.decode()
        elif mark == "q":
            reached[Kind(kind)] = int(value)
    return Reports(
        ready=frozenset(values[Kind.READY]),
        shares=frozenset(values[Kind.SHARES]),
        uploads={name: Upload(*json.loads(value)[:2]) for name, value in values[Kind.UPLOAD].items()},
        confirmations=frozenset(values[Kind.CONFIRMATION]),
        reveals=frozenset(values[Kind.REVEAL]),
        digests={name: Seen(*json.loads(value)) for name, value in values[Kind.DIGEST].items()},
        states={name: State(*json.loads(value)) for name, value in values[Kind.STATE].items()},
        verdicts={name: Verdict(*json.loads(value)) for name, value in values[Kind.VERDICT].items()},
        reached_ms=reached,
    )


def parse_declined(answer: Mapping[bytes, bytes]) -> dict[str, Decline]:
    return {name.decode(): Decline(*json.loads(value)) for name, value in answer.items()}
