"""Events that the aggregator reports for the audit log."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.aggregator.domain.sums import AttemptId
from services.common.errors import FedmeshError
from services.common.ids import derived_id


@dataclass(frozen=True)
class Event:
    """See `fedmesh.audit.v1.Event`; `event_id` follows from what happened, so that telling it twice is harmless."""

    event_id: str
    type: str
    occurred_at: datetime
    actor: str
    subject: str
    body_json: str


def contribution_accepted(
    attempt: AttemptId, consortium: str, hospital_id: str, sha256: str, size_bytes: int, at: datetime
) -> Event:
    """A hospital's ciphertext is in the sum."""
    return Event(
        derived_id("contribution.accepted", attempt, hospital_id, sha256),
        "contribution.accepted",
        at,
        f"spiffe://{consortium}/hospital/{hospital_id}",
        f"job/{attempt.job_id}",
        _body(attempt, hospital_id=hospital_id, ciphertext_sha256=sha256, size_bytes=size_bytes),
    )


def upload_refused(
    attempt: AttemptId, consortium: str, hospital_id: str, strike_id: str, error: FedmeshError, at: datetime
) -> Event:
    """A hospital sent something that is no contribution. Its id follows from the strike's, not from the sender's."""
    return Event(
        derived_id("call.refused", strike_id),
        "call.refused",
        at,
        f"spiffe://{consortium}/hospital/{hospital_id}",
        f"hospital/{hospital_id}",
        _body(attempt, method="Upload", code=error.code.value, reason=error.message),
    )


def _body(attempt: AttemptId, **facts: Any) -> str:
    body = {"job_id": attempt.job_id, "round": attempt.round, "attempt": attempt.attempt, **facts}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
