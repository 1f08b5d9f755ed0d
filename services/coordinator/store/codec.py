"""Attempts and reports to and from what Redis holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from services.coordinator.domain.attempt import (
    ACCEPTS,
    Attempt,
    Contribution,
    Decline,
    Kind,
    Phase,
    Reports,
    State,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import quorum


def record_fields(attempt: Attempt) -> dict[str, str | int]:
    """The record's fields: the attempt as JSON, and apart from it what the scripts look at."""
    kind = ACCEPTS.get(attempt.phase)
    return {
        "core": json.dumps(asdict(attempt), separators=(",", ":")),
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


def parse_attempt(core: bytes) -> Attempt:
    values: dict[str, Any] = json.loads(core)
    for item in fields(Attempt):
        if isinstance(values[item.name], list):
            values[item.name] = tuple(values[item.name])
    values["phase"] = Phase(values["phase"])
    values["contributions"] = tuple(Contribution(*item) for item in values["contributions"])
    if values["aborted_in"] is not None:
        values["aborted_in"] = Phase(values["aborted_in"])
    return Attempt(**values)


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
        uploads={name: Upload(*json.loads(value)) for name, value in values[Kind.UPLOAD].items()},
        digests=values[Kind.DIGEST],
        states={name: State(*json.loads(value)) for name, value in values[Kind.STATE].items()},
        verdicts={name: Verdict(*json.loads(value)) for name, value in values[Kind.VERDICT].items()},
        reached_ms=reached,
    )


def parse_declined(answer: Mapping[bytes, bytes]) -> dict[str, Decline]:
    return {name.decode(): Decline(*json.loads(value)) for name, value in answer.items()}


def report_value(value: Upload | State | Verdict | Decline | str) -> str:
    """A report as it is stored; equal reports have equal text."""
    return value if isinstance(value, str) else json.dumps(list(value), separators=(",", ":"))
