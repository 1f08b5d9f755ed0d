"""Percentiles of a handful of runs."""

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of some values: one of them, so of few values the 99th is the largest."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, 99th percentile and number of some measurements."""
    return {"p50": percentile(seconds, 0.5), "p99": percentile(seconds, 0.99), "runs": len(seconds)}
