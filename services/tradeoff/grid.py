"""The values of epsilon that are tried, and the plan at each of them."""

import json
import math
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.plans.document import validate
from services.plans.manifest import MAX_EPSILON, PlanManifest, canonical_bytes

# Share of the gain over chance that a recommended epsilon keeps.
KEEP: Final = 0.9
DEFAULT_GRID: Final = "0.05,0.1,0.2,0.3,0.5,1,2"
_MOST_POINTS: Final = 40


def parse_grid(text: str) -> tuple[float, ...]:
    """Values of epsilon from a list with commas, sorted.

    Raises: FedmeshError(INVALID_ARGUMENT) naming the value that cannot be used.
    """
    grid = [_epsilon(part.strip()) for part in text.split(",")]
    twice = sorted({value for value in grid if grid.count(value) > 1})
    if twice:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--epsilon has {', '.join(f'{value:g}' for value in twice)} twice")
    if len(grid) > _MOST_POINTS:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--epsilon has {len(grid)} values, at most {_MOST_POINTS} are tried")
    return tuple(sorted(grid))


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_EPSILON:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"--epsilon has {text!r}: use numbers above 0 and at most {MAX_EPSILON:g}, such as {DEFAULT_GRID}",
        )
    return value


def require_private(plan: PlanManifest) -> None:
    """Raises: FedmeshError(PLAN_INVALID) for a plan that has no epsilon to choose."""
    if plan.privacy is None:
        raise FedmeshError(
            Code.PLAN_INVALID, f"plan {plan.name} has privacy: null, so there is no epsilon to choose: nothing to trade"
        )


def plan_at(plan: PlanManifest, epsilon: float) -> PlanManifest:
    """The plan with another epsilon, that of its metrics included.

    Raises: FedmeshError(PLAN_INVALID) for an epsilon that no plan may have.
    """
    document = _document(plan)
    document["privacy"]["epsilon"] = epsilon
    if document["metrics"] is not None:
        document["metrics"]["epsilon"] = epsilon
    return validate(PlanManifest, document, f"plan {plan.name}", Code.PLAN_INVALID)


def without_privacy(plan: PlanManifest) -> PlanManifest:
    """The same model, features, algorithm and rounds, neither clipped nor noised, and with all encounters.

    Raises: FedmeshError(PLAN_INVALID) when its sums do not fit their lanes: what clipping bounds is unbounded here.
    """
    document = _document(plan)
    document["privacy"] = None
    if document["metrics"] is not None:
        document["metrics"] |= {"epsilon": None, "delta": None}
    return validate(PlanManifest, document, f"plan {plan.name} without privacy", Code.PLAN_INVALID)


def _document(plan: PlanManifest) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(canonical_bytes(plan))
    return document
