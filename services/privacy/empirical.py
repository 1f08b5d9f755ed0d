"""From the errors of an attack to a lower bound on epsilon, and how far such a bound can be trusted.

An attacker is told one of two worlds, with or without one patient, and says which. Whatever it does, a mechanism that
is mu-Gaussian-DP keeps its error rates on or above the curve Phi^-1(1 - false positives) - Phi^-1(false negatives) = mu
(Dong, Roth and Su 2022), and a sum with Gaussian noise of standard deviation Delta / mu is exactly mu-GDP. So an upper
confidence limit for both error rates gives a lower one for mu, and through `accounting` for epsilon at a delta (Nasr et
al. 2023, "Tight Auditing of Differentially Private Machine Learning", section 4). The limits are Clopper and Pearson's;
each may be wrong with half the probability, so the bound holds with the whole confidence however the two counts depend
on each other.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.privacy.accounting import gaussian_epsilon, gaussian_multiplier

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chances:
    """The probability that an audit refuses a mechanism of exactly the claimed mu, and that it passes a worse one."""

    false_alarm: float
    missed: float


def claimed_mu(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism that has exactly (epsilon, delta). Raises: as `gaussian_multiplier`."""
    return 1 / gaussian_multiplier(epsilon, delta, 1)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a mu-GDP mechanism; 0 for mu <= 0."""
    return gaussian_epsilon(1 / mu, 1, delta) if mu > 0 else 0.0


def mu_lower_bound(false_positives: int, false_negatives: int, runs: int, confidence: float) -> float:
    """Lower bound on mu after `runs` runs in each world, which holds with probability `confidence`; may be negative.

    Raises: FedmeshError(INVALID_ARGUMENT) for counts or a confidence out of range.
    """
    if not (0 <= false_positives <= runs and 0 <= false_negatives <= runs and runs > 0):
        raise FedmeshError(Code.INVALID_ARGUMENT, "errors must be counts of runs, and runs at least 1")
    quantiles = _quantiles(np.array([false_positives, false_negatives]), runs, confidence)
    return float(quantiles.sum())


def chances(runs: int, claimed: float, worse: float, confidence: float, *, paired: bool) -> Chances:
    """How often the verdict "the bound on mu exceeds `claimed`" is wrong, computed exactly.

    The attacker's threshold is the middle between the worlds: both error rates are Phi(-mu / 2). paired: both worlds of
    a run have the same noise, so at most one of its two errors happens; otherwise the counts are independent.
    """
    return Chances(
        false_alarm=_probability_above(runs, claimed, claimed, confidence, paired)[0],
        missed=_probability_above(runs, worse, claimed, confidence, paired)[1],
    )


def _probability_above(runs: int, mu: float, claimed: float, confidence: float, paired: bool) -> tuple[float, float]:
    """Probabilities that the bound exceeds `claimed`, and that it does not, for a mechanism of `mu`."""
    from scipy.special import ndtr
    from scipy.stats import binom

    counts = np.arange(runs + 1)
    quantiles = _quantiles(counts, runs, confidence)
    rate = float(ndtr(-mu / 2))
    # For each number of false positives, the most false negatives with which the bound exceeds: quantiles fall.
    most = np.searchsorted(-quantiles, quantiles - claimed, side="left") - 1
    left, conditional = (runs - counts, rate / (1 - rate)) if paired else (runs, rate)
    above = np.where(most < 0, 0.0, binom.cdf(most, left, conditional))
    below = np.where(most < 0, 1.0, binom.sf(most, left, conditional))
    weights = binom.pmf(counts, runs, rate)
    return float(weights @ above), float(weights @ below)


def _quantiles(errors: npt.NDArray[np.int64], runs: int, confidence: float) -> Reals:
    """Phi^-1(1 - upper limit of the error rate), by Clopper and Pearson with half of 1 - `confidence`."""
    from scipy.special import betaincinv, ndtri

    if not 0 < confidence < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the confidence must lie strictly between 0 and 1, got {confidence}")
    certain = errors >= runs
    upper = betaincinv(np.where(certain, 1, errors + 1), np.where(certain, 1, runs - errors), (1 + confidence) / 2)
    return np.asarray(-ndtri(np.where(certain, 1.0, upper)), dtype=np.float64)
