"""Events that the coordinator reports for the audit log. They follow from an attempt, so any replica tells the same."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from services.common.ids import derived_id
from services.coordinator.domain.attempt import Attempt, AttemptId, Decline


@dataclass(frozen=True)
class Event:
    """See `fedmesh.audit.v1.Event`; `event_id` follows from what happened, so that telling it twice is harmless."""

    event_id: str
    type: str
    occurred_at: datetime
    actor: str
    subject: str
    body_json: str


def attempt_events(attempt: Attempt, actor: str) -> list[Event]:
    """All that has happened in an attempt so far, oldest first. `actor` is the coordinator's SPIFFE id."""
    told = []
    if attempt.group:
        told.append(_event(attempt, actor, "round.sealed", attempt.sealed_ms, group=attempt.group))
    if attempt.sum_sha256:
        contributions = [
            {"hospital_id": item.hospital_id, "ciphertext_sha256": item.sha256} for item in attempt.contributions
        ]
        facts = {"contributions": contributions, "sum_sha256": attempt.sum_sha256}
        told.append(_event(attempt, actor, "sum.closed", attempt.closed_ms, **facts))
    if attempt.agreeing:
        facts = {"agreeing": attempt.agreeing, "dissenting": attempt.dissenting, "sum_sha256": attempt.sum_sha256}
        told.append(_event(attempt, actor, "round.agreed", attempt.agreed_ms, **facts))
    if attempt.next_state_sha256:
        facts = {"finalizer": attempt.finalizer, "state_sha256": attempt.next_state_sha256}
        told.append(_event(attempt, actor, "round.finalized", attempt.finalized_ms, **facts))
    if attempt.aborted_in is not None:
        facts = {"phase": attempt.aborted_in.name.lower(), "reason": attempt.reason}
        told.append(_event(attempt, actor, "attempt.aborted", attempt.phase_ms, **facts))
    return told


def hospital_declined(job_id: str, consortium: str, hospital_id: str, decline: Decline, at: datetime) -> Event:
    """A hospital does not take part in a job."""
    return Event(
        derived_id("hospital.declined", job_id, hospital_id),
        "hospital.declined",
        at,
        f"spiffe://{consortium}/hospital/{hospital_id}",
        f"job/{job_id}",
        _json(hospital_id=hospital_id, code=decline.code, reason=decline.reason),
    )


def _event(attempt: Attempt, actor: str, event_type: str, at_ms: int, **facts: Any) -> Event:
    named: AttemptId = attempt.id
    return Event(
        derived_id(event_type, *named),
        event_type,
        datetime.fromtimestamp(at_ms / 1000, UTC),
        actor,
        f"job/{attempt.job_id}",
        _json(job_id=named.job_id, round=named.round, attempt=named.attempt, **facts),
    )


def _json(**facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
