"""Attempts in every phase, for tests of the coordinator's state machine."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.coordinator.domain.attempt import Attempt, Contribution, Decline, Phase, Seen, Surroundings
from services.coordinator.domain.machine import Rules
from services.secure_sum.cohort import threshold

RULES = Rules(
    ready_ms=60_000, phase_ms=30_000, absence_grace_ms=3000, answer_grace_ms=2000, max_attempts=3, extra_attempts=None
)
SHA256 = "ab" * 32
STATE, OTHER_STATE = "aa" * 32, "bb" * 32
LIST = '{"type":"survivors"}'


def cohort(n: int) -> tuple[str, ...]:
    return tuple(f"h{number:02d}" for number in range(1, n + 1))


def training(n: int = 15, **changes: Any) -> Attempt:
    attempt = Attempt("job", 1, 1, SHA256, 0, "", cohort(n), Phase.TRAINING, 0, 60_000, SHA256, n, 1)
    return replace(attempt, **changes)


def sharing(n: int = 15) -> Attempt:
    return training(n).sealed(dict.fromkeys(cohort(n), 0), SHA256, 1, 30_000)


def uploading(n: int = 15) -> Attempt:
    return sharing(n).shared(cohort(n), 2).uploading(100, 2, 30_000)


def confirming(n: int = 15) -> Attempt:
    return uploading(n).listed(tuple(Contribution(name, SHA256) for name in cohort(n)), LIST, 3, 30_000)


def unmasking(n: int = 15) -> Attempt:
    return confirming(n).confirmed(cohort(n)[: threshold(n)], 4, 30_000)


def agreeing_state(n: int = 15, finalizer: str = "h01") -> Attempt:
    return unmasking(n).summed(cohort(n)[: threshold(n)], SHA256, finalizer, 5, 30_000)


def seen(names: tuple[str, ...], digest: str = "d", state: str = STATE) -> dict[str, Seen]:
    return {name: Seen(digest, state, f'{{"from":{int(name[1:])}}}') for name in names}


def at(now_ms: int, absent: Mapping[str, int] | None = None, declined: tuple[str, ...] = ()) -> Surroundings:
    return Surroundings(now_ms, absent or {}, {name: Decline("data-invalid", "no") for name in declined})
