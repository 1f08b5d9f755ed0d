"""Events that the coordinator reports for the audit log. They follow from an attempt, so any replica tells the same."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from services.common.errors import FedmeshError
from services.common.ids import derived_id
from services.coordinator.domain.attempt import Attempt, AttemptId, Decline, Phase


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
    told: list[Event] = []

    def tell(event_type: str, at_ms: int, **facts: Any) -> None:
        told.append(_event(attempt, actor, event_type, at_ms, **facts))

    if attempt.group:
        roster = {"roster_sha256": attempt.roster_sha256, "epoch": attempt.epoch}
        # Of asynchronous rounds only; in the others every age is 0.
        ages = {"ages": attempt.ages} if attempt.enough else {}
        sealed = {"group": attempt.group, "adverts_sha256": attempt.adverts_sha256, **roster, **ages}
        tell("round.sealed", attempt.sealed_ms, **sealed)
    if attempt.sharers:
        tell("round.shared", attempt.shared_ms, sharers=attempt.sharers)
    if attempt.bound:
        tell("survivors.confirmed", attempt.confirmed_ms, confirming=attempt.confirming, **_survivors(attempt))
    if attempt.sum_sha256:
        dropped = sorted(set(attempt.sharers) - set(attempt.survivor_ids))
        opened = {"revealing": attempt.revealing, "survivors_sha256": attempt.survivors_sha256, "dropped": dropped}
        tell("masks.opened", attempt.summed_ms, **opened)
        tell("sum.computed", attempt.summed_ms, sum_sha256=attempt.sum_sha256, **_survivors(attempt))
    agreement = attempt.agreement
    if agreement.agreeing:
        facts = {"agreeing": agreement.agreeing, "dissenting": agreement.dissenting, "sum_sha256": attempt.sum_sha256}
        tell("round.agreed", attempt.agreed_ms, **facts)
    if attempt.next_state_sha256:
        facts = {"finalizer": attempt.finalizer, "state_sha256": attempt.next_state_sha256}
        tell("round.finalized", attempt.finalized_ms, **facts)
    if attempt.ended_in is not None:
        event_type = "attempt.burnt" if attempt.phase is Phase.BURNT else "attempt.aborted"
        tell(event_type, attempt.phase_ms, phase=attempt.ended_in.name.lower(), reason=attempt.reason)
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


def report_refused(
    attempt: AttemptId,
    consortium: str,
    hospital_id: str,
    method: str,
    request_id: str,
    error: FedmeshError,
    at: datetime,
) -> Event:
    """A hospital sent a statement that no honest node sends: a strike."""
    return Event(
        derived_id("call.refused", attempt, hospital_id, request_id, error.code.value),
        "call.refused",
        at,
        f"spiffe://{consortium}/hospital/{hospital_id}",
        f"hospital/{hospital_id}",
        _json(**attempt._asdict(), method=method, code=error.code.value, reason=error.message),
    )


def _survivors(attempt: Attempt) -> dict[str, Any]:
    contributions = [
        {"hospital_id": item.hospital_id, "ciphertext_sha256": item.sha256} for item in attempt.contributions
    ]
    return {"survivors_sha256": attempt.survivors_sha256, "contributions": contributions}


def _event(attempt: Attempt, actor: str, event_type: str, at_ms: int, **facts: Any) -> Event:
    return Event(
        derived_id(event_type, *attempt.id),
        event_type,
        datetime.fromtimestamp(at_ms / 1000, UTC),
        actor,
        f"job/{attempt.job_id}",
        _json(**attempt.id._asdict(), **facts),
    )


def _json(**facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
