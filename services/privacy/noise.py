"""The noise plan of a job, and the sampler that a hospital draws its share from."""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.privacy import accounting
from services.secure_sum import cohort


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta)-DP for a patient at a hospital, against everyone including any `colluders` hospitals."""

    epsilon: float
    delta: float
    colluders: int

    def __str__(self) -> str:
        """The one way in which people are told a guarantee; epsilon is rounded up."""
        return f"(epsilon {_rounded_up(self.epsilon):g}, delta {self.delta:g}, f {self.colluders})"


def _rounded_up(epsilon: float) -> float:
    """To four decimals; what the closed form adds to be safe, some 1e-9, is forgiven."""
    return math.ceil(epsilon * 1e4 - 1e-4) / 1e4


@dataclass(frozen=True)
class NoisePlan:
    """How much noise each hospital adds in each round, in integer units; made by `plan_noise`."""

    guarantee: Guarantee
    compositions: int
    """Releases that the guarantee covers: every attempt that may reveal a sum counts."""
    hospitals: int
    sensitivity: float
    """Delta: largest integer L2 norm of one patient's contribution."""
    noise_multiplier: float
    """z: the continuous Gaussian that the guarantee rests on has standard deviation z * Delta."""
    sigma: float
    """Total sigma of the t - f honest shares."""
    share_sigma: float
    """sigma / sqrt(t - f): what every hospital draws with, for each value."""
    accounted_delta: float
    """What is left of delta after the reserve for discrete shares; the accountant is asked with this."""

    @property
    def sum_sigma(self) -> float:
        """Standard deviation of the noise in a sum of all hospitals, colluders honest or not: for utility only."""
        return self.share_sigma * math.sqrt(self.hospitals)

    def epsilon_after(self, attempts: int) -> float:
        """Epsilon spent after `attempts` releases, at the plan's delta (closed form; for ledgers and live display).

        Not capped at the plan's epsilon: attempts beyond `compositions` show what they would cost.

        Raises:
            FedmeshError: INVALID_ARGUMENT if `attempts` is negative.
        """
        if attempts < 0:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"attempts must not be negative, got {attempts}")
        if attempts == 0:
            return 0.0
        return accounting.gaussian_epsilon(self.noise_multiplier, attempts, self.accounted_delta)

    def guarantee_after(self, attempts: int) -> Guarantee:
        """What has been spent after `attempts` releases. Raises: as `epsilon_after`."""
        return replace(self.guarantee, epsilon=self.epsilon_after(attempts))

    def epsilon_against(self, colluders: int) -> float:
        """Epsilon of the whole plan when `colluders` hospitals know each other's shares, in the smallest group of t.

        Raises:
            FedmeshError: INVALID_ARGUMENT unless 0 <= `colluders` < t: with t of them nobody else need be in the sum.
        """
        least = cohort.threshold(self.hospitals)
        if not 0 <= colluders < least:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"colluders must be from 0 to {least - 1}, got {colluders}")
        return self.epsilon_of_shares(least - colluders)

    def epsilon_of_shares(self, shares: int) -> float:
        """Epsilon of the whole plan under `shares` unknown shares of noise; 1: an update that was opened alone."""
        variance = shares * self.share_sigma**2 - accounting.ROUNDING_SIGMA**2
        multiplier = math.sqrt(variance) / self.sensitivity
        return accounting.gaussian_epsilon(multiplier, self.compositions, self.accounted_delta)


def plan_noise(
    *,
    epsilon: float,
    delta: float,
    compositions: int,
    sensitivity: float,
    dimension: int,
    hospitals: int,
    colluders: int | None = None,
    noise_multiplier: float | None = None,
) -> NoisePlan:
    """Calibrate the noise of a plan, or check the multiplier that a plan states.

    The total variance is (z * Delta)^2 + r^2; a share has 1 / (t - f) of it (see `accounting` for r).

    Args:
        epsilon, delta: the guarantee for the whole plan.
        compositions: releases that may happen, failed attempts included.
        sensitivity: integer L2 bound of one patient's contribution.
        dimension: values a release.
        hospitals: active hospitals n.
        colluders: f; None: as many as a cohort of n tolerates.
        noise_multiplier: z if the plan states one. Otherwise it is calibrated; either way the closed form checks it.

    Raises:
        FedmeshError: PRIVACY_REFUSED if n < 4, f is more than n hospitals tolerate, a share's sigma is below 4 units,
            or the stated multiplier does not give the guarantee; INVALID_ARGUMENT for numbers out of range.
    """
    colluders = cohort.tolerated(hospitals, colluders)
    divisor = cohort.noise_share_divisor(hospitals, colluders)
    if not (sensitivity > 0 and math.isfinite(sensitivity)) or dimension < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the sensitivity must be positive and the dimension at least 1")
    if not (epsilon > 0 and math.isfinite(epsilon) and 0 < delta < 1 and compositions >= 1):
        raise FedmeshError(Code.INVALID_ARGUMENT, "epsilon, delta or the number of compositions is out of range")
    reserve = accounting.discretisation_delta(accounting.MIN_SHARE_SIGMA, divisor, dimension, compositions, epsilon)
    accounted_delta = delta - reserve
    if accounted_delta <= 0:
        raise FedmeshError(Code.PRIVACY_REFUSED, f"delta {delta:g} is below the reserve for discrete noise")
    multiplier = noise_multiplier
    if multiplier is None:
        multiplier = accounting.gaussian_multiplier(epsilon, accounted_delta, compositions)
    _require_guarantee(multiplier, epsilon, accounted_delta, compositions)
    sigma = math.hypot(multiplier * sensitivity, accounting.ROUNDING_SIGMA)
    share_sigma = sigma / math.sqrt(divisor)
    accounting.require_share_sigma(share_sigma)
    return NoisePlan(
        guarantee=Guarantee(epsilon, delta, colluders),
        compositions=compositions,
        hospitals=hospitals,
        sensitivity=sensitivity,
        noise_multiplier=multiplier,
        sigma=sigma,
        share_sigma=share_sigma,
        accounted_delta=accounted_delta,
    )


def _require_guarantee(multiplier: float, epsilon: float, delta: float, compositions: int) -> None:
    reached = accounting.gaussian_epsilon(multiplier, compositions, delta)
    # The closed form is rounded up by 1e-9: a multiplier calibrated exactly must not fail on that.
    if reached > epsilon + 2e-9:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"noise multiplier {multiplier:.6g} over {compositions} releases gives epsilon {reached:.6g}, "
            f"more than the {epsilon:g} that the plan promises: raise the multiplier or lower the rounds",
            epsilon=reached,
            promised=epsilon,
        )


def discrete_gaussian(sigma: float, size: int) -> npt.NDArray[np.int64]:
    """Draw int64[size] independent discrete Gaussians of parameter `sigma`, mean 0, exactly.

    OpenDP's sampler: exact rational arithmetic (Canonne, Kamath and Steinke 2020, algorithm 3) on randomness of the
    operating system, so no floating-point bits leak (Mironov 2012). About 80,000 draws a second.

    Args:
        sigma: integer units; probability of k is proportional to exp(-k^2 / (2 sigma^2)).

    Raises:
        FedmeshError: INVALID_ARGUMENT unless `sigma` is positive and finite and `size` is not negative.
    """
    if not (sigma > 0 and math.isfinite(sigma)) or size < 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot draw {size} values with sigma {sigma}")
    # `opendp.prelude` would import SciPy and scikit-learn as well (1.8 s); these four modules take 0.4 s.
    from opendp.domains import atom_domain, vector_domain
    from opendp.measurements import make_gaussian
    from opendp.metrics import l2_distance
    from opendp.mod import enable_features

    enable_features("contrib")
    space = vector_domain(atom_domain(T="i64")), l2_distance(T="f64")
    return np.asarray(make_gaussian(*space, scale=sigma)([0] * size), dtype=np.int64)
