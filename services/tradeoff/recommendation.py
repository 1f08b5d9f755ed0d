"""Which epsilon to choose, and why: rules on a curve, without input or output."""

import math
from dataclasses import dataclass
from typing import Any, Final

from services.privacy.budget import WINDOW, Limit, Remaining
from services.tradeoff.curve import Band, Curve, Point

_LEAST_FOR_KNEE: Final = 3


@dataclass(frozen=True)
class Recommendation:
    """rule: `keeps` (the smallest epsilon that keeps enough of the gain), `knee` or `best` (none does). fits_default:
    whether one job at this epsilon fits the default budget of a population."""

    epsilon: float
    rule: str
    reasons: tuple[str, ...]
    fits_default: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "rule": self.rule,
            "fits_default_budget": self.fits_default,
            "reasons": list(self.reasons),
        }


def kept_gain(value: float, reference: float, chance: float) -> float:
    """Share of what the reference gains over chance that a model keeps; 1 where the reference gains nothing."""
    return (value - chance) / (reference - chance) if reference > chance else 1.0


def recommend(curve: Curve, keep: float, delta: float, limit: Limit, left: dict[str, Remaining]) -> Recommendation:
    """The smallest epsilon whose lower confidence bounds keep at least `keep` of the gain over chance that the plan has
    without privacy, in AUROC and in AUPRC; else the knee of the curve, else its best point.

    delta: the plan's. limit: the default budget. left: what named populations have left, of ledgers that were shown.
    """
    point, rule, why = _choose(curve, keep)
    reasons = [why, *_against_alone(point, curve), *_ceiling(point, curve)]
    fits = point.epsilon <= limit.epsilon and delta <= limit.delta
    reasons.append(_default_budget(point, curve, fits, limit))
    reasons += [_ledger(point.epsilon, delta, population, has) for population, has in sorted(left.items())]
    if curve.runs == 1:
        reasons.append("One run at each epsilon: no band, so luck of the noise and epsilon cannot be told apart.")
    return Recommendation(point.epsilon, rule, tuple(reasons), fits)


def least_kept(point: Point, curve: Curve) -> float:
    """Share of the gain over chance that is kept at least, by the lower bounds: the smaller of AUROC's and AUPRC's."""
    return min(
        kept_gain(point.auroc.floor, curve.reference.auroc, 0.5),
        kept_gain(point.auprc.floor, curve.reference.auprc, curve.prevalence),
    )


def _choose(curve: Curve, keep: float) -> tuple[Point, str, str]:
    bound = "lower 95 % bounds keep" if curve.runs > 1 else "figures keep"
    enough = [point for point in curve.points if least_kept(point, curve) >= keep]
    if enough:
        point = enough[0]
        return (
            point,
            "keeps",
            (
                f"The smallest epsilon of the grid whose {bound} at least {keep:.0%} of what the plan gains over "
                f"chance without privacy, in AUROC and in AUPRC: {least_kept(point, curve):.0%}."
            ),
        )
    none = f"No epsilon of the grid has {bound.removesuffix(' keep')} that keep {keep:.0%} of the gain over chance"
    bend = knee([point.epsilon for point in curve.points], [point.auroc.mean for point in curve.points])
    if bend is not None:
        point = curve.points[bend]
        return (
            point,
            "knee",
            (f"{none}; here the curve of AUROC against log epsilon bends most: less costs most, more gains least."),
        )
    point = max(curve.points, key=lambda point: point.auroc.mean)
    return point, "best", f"{none}, and the curve has no knee: this is its best AUROC. Try a wider grid."


def knee(epsilons: list[float], values: list[float]) -> int | None:
    """Index of the point farthest above the chord from the first to the last, over log epsilon (the rule of Satopaa et
    al. 2011); None with fewer than three points, or when none lies above it."""
    if len(epsilons) < _LEAST_FOR_KNEE or values[-1] <= values[0]:
        return None
    x = [math.log(value) for value in epsilons]
    above = [
        (value - values[0]) / (values[-1] - values[0]) - (at - x[0]) / (x[-1] - x[0])
        for at, value in zip(x, values, strict=True)
    ]
    best = max(range(len(above)), key=above.__getitem__)
    return best if above[best] > 0 else None


def _against_alone(point: Point, curve: Curve) -> list[str]:
    if _above(point.auroc, curve.alone.auroc) and _above(point.auprc, curve.alone.auprc):
        verdict = "above"
    elif _below(point.auroc, curve.alone.auroc) and _below(point.auprc, curve.alone.auprc):
        verdict = "below"
    else:
        verdict = "not clearly above"
    return [
        f"It is {verdict} the mean hospital alone, which has no noise to bear: AUROC {point.auroc.mean:.4f} against "
        f"{curve.alone.auroc:.4f}, AUPRC {point.auprc.mean:.4f} against {curve.alone.auprc:.4f}.",
        f"Hospitals that train alone under the same guarantee reach AUROC {point.alone.auroc:.4f} and AUPRC "
        f"{point.alone.auprc:.4f} on average: together, AUPRC is {point.auprc.mean / point.alone.auprc - 1:+.0%}.",
    ]


def _above(band: Band, value: float) -> bool:
    return band.floor > value


def _below(band: Band, value: float) -> bool:
    return (band.mean if band.high is None else band.high) < value


def _ceiling(point: Point, curve: Curve) -> list[str]:
    last = curve.points[-1]
    if last is point:
        return ["It is the largest epsilon of the grid: a wider grid would say whether more is worth having."]
    return [
        f"The largest epsilon of the grid, {last.epsilon:g}, changes AUROC by "
        f"{last.auroc.mean - point.auroc.mean:+.4f} and AUPRC by {last.auprc.mean - point.auprc.mean:+.4f}."
    ]


def _default_budget(point: Point, curve: Curve, fits: bool, limit: Limit) -> str:
    budget = f"the default budget of a population, epsilon {limit.epsilon:g} in any {WINDOW.days} days"
    if fits:
        left = limit.epsilon - point.epsilon
        return f"It fits {budget}, and leaves " + (f"{left:.3g} of it." if left > 0 else "nothing of it.")
    text = f"It does not fit {budget}: every hospital needs two approvers (`fedmesh privacy approve`)."
    affordable = [other for other in curve.points if other.epsilon <= limit.epsilon]
    if not affordable:
        return text
    most = affordable[-1]
    return f"{text} Within it epsilon {most.epsilon:g} has AUROC {most.auroc.mean:.4f}, AUPRC {most.auprc.mean:.4f}."


def _ledger(epsilon: float, delta: float, population: str, left: Remaining) -> str:
    fits = epsilon <= left.epsilon and delta <= left.delta
    verdict = "it fits" if fits else "it does not fit"
    return (
        f"Population {population} has epsilon {left.epsilon:.3g} left by its ledger and the default limit: {verdict}."
    )
