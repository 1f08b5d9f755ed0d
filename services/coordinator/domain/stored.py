"""Attempts, reports and statements as text and bytes: what stores and the registry keep."""

import json
from dataclasses import asdict, fields
from typing import Any

from services.coordinator.domain.attempt import (
    Agreement,
    Attempt,
    Contribution,
    Decline,
    Phase,
    Seen,
    State,
    Upload,
    Verdict,
)
from services.secure_sum.statements import SIGNATURE_BYTES, Signed


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
        # A record of the release before lacks the newest fields: their defaults are what it meant.
        if isinstance(values.get(item.name), list):
            values[item.name] = tuple(values[item.name])
    return values


def report_value(value: Upload | Seen | State | Verdict | Decline | str) -> str:
    """A report as it is stored; equal reports have equal text."""
    return value if isinstance(value, str) else json.dumps(list(value), separators=(",", ":"))


def sealed_statement(signed: Signed) -> bytes:
    """A signed statement as it is stored; whose it is stands in the name of its field."""
    return signed.signature + signed.statement


def parse_statement(hospital_id: str, value: bytes) -> Signed:
    return Signed(hospital_id, value[SIGNATURE_BYTES:], value[:SIGNATURE_BYTES])
