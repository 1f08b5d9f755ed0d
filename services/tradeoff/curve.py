"""The measured curve: means over runs with their confidence bands."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from scipy.special import stdtrit

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Band:
    """A figure over runs. low, high: the 95 % confidence interval of its mean by Student's t; sd: of single runs, ddof
    1. All three are None after one run, which says nothing about luck."""

    values: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    @property
    def floor(self) -> float:
        """The lower end where there is a band, else the one value."""
        return self.mean if self.low is None else self.low

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "low": self.low, "high": self.high, "values": list(self.values)}


def band_of(values: Sequence[float]) -> Band:
    """values: at least one, of runs that differ by their noise alone."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Band(tuple(values), mean, None, None, None)
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(len(values))
    return Band(tuple(values), mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class Scores:
    """A model's areas under the ROC and precision-recall curves on the held-out rows."""

    auroc: float
    auprc: float


@dataclass(frozen=True)
class Point:
    """One epsilon. noise_sigma: standard deviation of the noise in each coordinate of a sum, in units of clip norms.
    alone: mean of the hospitals that train the same plan alone under the same guarantee."""

    epsilon: float
    noise_sigma: float
    auroc: Band
    auprc: Band
    alone: Scores

    def as_dict(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "noise_sigma_in_clip_norms": self.noise_sigma,
            "auroc": self.auroc.as_dict(),
            "auprc": self.auprc.as_dict(),
            "alone_at_this_epsilon": asdict(self.alone),
        }


@dataclass(frozen=True)
class Curve:
    """points: by epsilon, smallest first. reference: the plan without privacy. alone: mean of the hospitals alone,
    without privacy. prevalence: share of positive rows, which is the AUPRC of chance."""

    points: tuple[Point, ...]
    reference: Scores
    alone: Scores
    prevalence: float
    runs: int
