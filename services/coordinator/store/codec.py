"""Attempts, reports and statements to and from what Redis holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from services.coordinator.domain.attempt import (
    ACCEPTS,
    Agreement,
    Attempt,
    Contribution,
    Decline,
    Kind,
    Phase,
    Reports,
    Seen,
    State,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import quorum
from services.secure_sum.statements import SIGNATURE_BYTES, Signed


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


def attempt_json(attempt: Attempt) -> str:
    return json.dumps(asdict(attempt), separators=(",", ":"))


def parse_attempt(core: bytes) -> Attempt:
    """Raises: ValueError, KeyError or TypeError when it is none."""
    values: dict[str, Any] = _tuples(json.loads(core), Attempt)
    values["phase"] = Phase(values["phase"])
    values["contributions"] = tuple(Contribution(*item) for item in values["contributions"])
    values["agreement"] = Agreement(**_tuples(values["agreement"], Agreement))
    if values["ended_in"] is not None:
        values["ended_in"] = Phase(values["ended_in"])
    return Attempt(**values)


def _tuples(values: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    for item in fields(kind):
        if isinstance(values[item.name], list):
            values[item.name] = tuple(values[item.name])
    return values


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


def report_value(value: Upload | Seen | State | Verdict | Decline | str) -> str:
    """A report as it is stored; equal reports have equal text."""
    return value if isinstance(value, str) else json.dumps(list(value), separators=(",", ":"))


def sealed_statement(signed: Signed) -> bytes:
    """A signed statement as it is stored; whose it is stands in the name of its field."""
    return signed.signature + signed.statement


def parse_statement(hospital_id: str, value: bytes) -> Signed:
    return Signed(hospital_id, value[SIGNATURE_BYTES:], value[:SIGNATURE_BYTES])
