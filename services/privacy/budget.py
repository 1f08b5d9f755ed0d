"""The rules of the privacy budget: pure functions over charges, for the hospital's ledger and the registry's.

A *source population* (one hospital's patients, whatever extract of them a job reads) may lose at most
`Limit.epsilon` and `Limit.delta` in any rolling 365 days. Across jobs, which are chosen adaptively, (epsilon, delta)
add up (basic composition, Dwork and Roth 2014, theorem 3.16). A job is charged its whole promise when it is reserved;
inside the job `NoisePlan.epsilon_after` shows what has been used of it.

Amounts are counted in whole parts per billion of epsilon, so sums are exact: a charge is rounded up and a limit down,
after forgiving 1e-12 of floating-point dust. 0.1 + 0.2 + 0.2 fits into 0.5; 0.5 + 1e-9 does not.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from services.common.errors import Code, FedmeshError

WINDOW: Final = timedelta(days=365)
_UNITS: Final = 10**9
_DELTA_UNITS: Final = 10**18
_DUST: Final = 1e-3
"""In units: 1e-12 of epsilon."""


@dataclass(frozen=True)
class Limit:
    """What a source population may lose in a rolling `WINDOW`."""

    epsilon: float = 0.5
    delta: float = 1e-5


DEFAULT_LIMIT: Final = Limit()


@dataclass(frozen=True)
class Charge:
    """One job's reserved or spent loss. Both count alike; only a reservation of which nothing was sent is removed."""

    job_id: str
    population: str
    epsilon: float
    delta: float
    at: datetime
    """When it was last spent (or reserved, if nothing was spent yet): timezone-aware UTC."""


@dataclass(frozen=True)
class Remaining:
    """What is left; never negative."""

    epsilon: float
    delta: float


def remaining(charges: Iterable[Charge], population: str, now: datetime, limit: Limit = DEFAULT_LIMIT) -> Remaining:
    """What `population` may still lose at `now`. A charge counts for the 365 days after its time."""
    epsilon, delta = _left(charges, population, now, limit)
    return Remaining(max(0, epsilon) / _UNITS, max(0, delta) / _DELTA_UNITS)


def require_budget(charges: Iterable[Charge], asked: Charge, now: datetime, limit: Limit = DEFAULT_LIMIT) -> Remaining:
    """Check that `asked` fits and return what would be left after it.

    Charges of the same job on the same population are superseded by `asked`, so repeating a reservation is harmless.

    Raises:
        FedmeshError: BUDGET_EXHAUSTED naming job, population, asked and left; INVALID_ARGUMENT for an amount that is
            negative, not finite, or zero epsilon.
    """
    cost, delta_cost = _cost(asked.epsilon, _UNITS), _cost(asked.delta, _DELTA_UNITS)
    if cost == 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "a charge must have a positive epsilon")
    others = [c for c in charges if (c.job_id, c.population) != (asked.job_id, asked.population)]
    epsilon, delta = _left(others, asked.population, now, limit)
    if cost > epsilon or delta_cost > delta:
        left = Remaining(max(0, epsilon) / _UNITS, max(0, delta) / _DELTA_UNITS)
        raise FedmeshError(
            Code.BUDGET_EXHAUSTED,
            f"job {asked.job_id} asks epsilon {asked.epsilon:.9g} and delta {asked.delta:.3g} of population "
            f"{asked.population}, which has epsilon {left.epsilon:.9g} and delta {left.delta:.3g} left of "
            f"{limit.epsilon:g} and {limit.delta:g} in {WINDOW.days} days",
            job_id=asked.job_id,
            population=asked.population,
            asked_epsilon=asked.epsilon,
            left_epsilon=left.epsilon,
            asked_delta=asked.delta,
            left_delta=left.delta,
        )
    return Remaining((epsilon - cost) / _UNITS, (delta - delta_cost) / _DELTA_UNITS)


def require_attempt(job_id: str, used: int, compositions: int) -> int:
    """Check that one more attempt is covered by the job's promise and return the attempts left after it.

    Every attempt whose masked bytes left the hospital is used, whatever became of its round.

    Raises:
        FedmeshError: BUDGET_EXHAUSTED naming the job and its number of attempts.
    """
    if used >= compositions:
        raise FedmeshError(
            Code.BUDGET_EXHAUSTED,
            f"job {job_id} has used all {compositions} attempts that its privacy guarantee covers",
            job_id=job_id,
            attempts=used,
            compositions=compositions,
        )
    return compositions - used - 1


def _left(charges: Iterable[Charge], population: str, now: datetime, limit: Limit) -> tuple[int, int]:
    counted = [c for c in charges if c.population == population and c.at > now - WINDOW]
    epsilon = _floor(limit.epsilon, _UNITS) - sum(_cost(c.epsilon, _UNITS) for c in counted)
    delta = _floor(limit.delta, _DELTA_UNITS) - sum(_cost(c.delta, _DELTA_UNITS) for c in counted)
    return epsilon, delta


def _cost(amount: float, units: int) -> int:
    if not (math.isfinite(amount) and amount >= 0):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a privacy charge must be finite and not negative, got {amount}")
    return math.ceil(amount * units - _DUST)


def _floor(amount: float, units: int) -> int:
    return math.floor(amount * units + _DUST)
