"""From noise to a guarantee and back.

One round releases a sum over patients, of L2 sensitivity Delta, plus noise of standard deviation z * Delta; z is the
*noise multiplier*. A plan of k rounds is an adaptive composition of k Gaussian mechanisms, which is exactly one
Gaussian mechanism with multiplier z / sqrt(k) (Dong, Roth and Su 2022, corollary 3.3), so nothing is lost in
composing.

*The noise is discrete and comes in shares.* Hospitals add discrete Gaussian shares, whose sum is not the Gaussian
above. The difference is bounded, not ignored; with s the sigma of a share, m = t - f honest shares, d values a round
and Delta in integer units:

1. m shares against one discrete Gaussian of variance m * s^2: the log ratio of probabilities is at most
   tau = 10 * sum_{j=1}^{m-1} exp(-2 pi^2 s^2 j / (j + 1)) a value (Kairouz, Liu and Steinke 2021, "The Distributed
   Discrete Gaussian Mechanism", the corollary on the convolution of many discrete Gaussians).
2. One discrete Gaussian of variance V = m * s^2 against a *post-processed continuous* Gaussian of variance V - r^2:
   round w to k with probability proportional to exp(-(k - w)^2 / (2 r^2)). By Poisson summation the normaliser lies
   within 1 +- eta of its mean, eta = 2 exp(-2 pi^2 r^2) / (1 - exp(-2 pi^2 r^2)), and so does the discrete
   Gaussian's, so the log ratio is at most ln((1 + eta) / (1 - eta)) a value (the convolution argument of Peikert
   2010). Post-processing costs no privacy.

The guarantee is that of a Gaussian of variance V - r^2 with r = 2 units, and delta is reduced by what the ratios can
move: with kappa their sum over all values and rounds, (1 + e^epsilon) * (e^kappa - 1). For shares of at least 4 units
that is below 1e-20 for every vector that this mesh can sum.
"""

import math
from functools import lru_cache
from typing import Final

from services.common.errors import Code, FedmeshError

MIN_SHARE_SIGMA: Final = 4.0
"""Least sigma of one hospital's share, in integer units."""

ROUNDING_SIGMA: Final = 2.0
"""r above, in integer units."""

_LOG_MASS_TRUNCATION: Final = -50.0
_MAX_NOISE_MULTIPLIER: Final = 1e6
_RELATIVE_ROUNDING: Final = 1e-6


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Least delta for which the continuous Gaussian mechanism is (epsilon, delta)-DP (Balle and Wang 2018, theorem 8).

    Raises:
        FedmeshError: INVALID_ARGUMENT unless `noise_multiplier` > 0 and `epsilon` >= 0.
    """
    if not (noise_multiplier > 0 and epsilon >= 0):
        raise FedmeshError(Code.INVALID_ARGUMENT, "the noise multiplier must be > 0 and epsilon >= 0")
    mu = 1 / noise_multiplier
    tail = _log_normal_cdf(-mu / 2 - epsilon / mu)
    return max(0.0, math.exp(_log_normal_cdf(mu / 2 - epsilon / mu)) - math.exp(epsilon + tail))


def gaussian_epsilon(noise_multiplier: float, compositions: int, delta: float) -> float:
    """Epsilon of `compositions` Gaussian mechanisms, in closed form: exact, and free of heavy imports.

    Rounded up by 1e-9, so it never understates. Agrees with the PLD accountant (`epsilon_of`), which is slightly
    pessimistic.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a multiplier or composition count that is not positive, or delta outside
            (0, 1).
    """
    _check(compositions, delta)
    single = noise_multiplier / math.sqrt(compositions)
    if gaussian_delta(single, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(single, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(single, middle) > delta else (low, middle)
    return high + 1e-9


@lru_cache(maxsize=1024)
def epsilon_of(noise_multiplier: float, compositions: int, delta: float) -> float:
    """Epsilon of `compositions` Gaussian mechanisms at `delta`, by the PLD accountant of dp-accounting.

    Uses the pessimistic estimate of the connect-the-dots discretisation (Doroshenko et al. 2022): never understates.
    The first call imports dp-accounting and SciPy (about a second and 45 MB).

    Raises:
        FedmeshError: INVALID_ARGUMENT as `gaussian_epsilon`.
    """
    _check(compositions, delta)
    if not noise_multiplier > 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the noise multiplier must be > 0")
    from dp_accounting.pld import privacy_loss_distribution

    single = noise_multiplier / math.sqrt(compositions)
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        single,
        pessimistic_estimate=True,
        # Fine enough for the least epsilon, coarse enough for the largest: about 1e5 buckets.
        value_discretization_interval=min(1e-4, 1e-4 / single),
        log_mass_truncation_bound=_LOG_MASS_TRUNCATION,
        use_connect_dots=True,
    )
    return float(loss.get_epsilon_for_delta(delta))


@lru_cache(maxsize=1024)
def gaussian_multiplier(epsilon: float, delta: float, compositions: int) -> float:
    """Least noise multiplier, rounded up, for which `gaussian_epsilon(result, compositions, delta) <= epsilon`.

    Exact for Gaussian mechanisms (Balle and Wang 2018), and needs the standard library only: a hospital node calibrates
    without importing dp-accounting and SciPy.

    Raises:
        FedmeshError: INVALID_ARGUMENT for numbers out of range; PRIVACY_REFUSED if no multiplier below 1e6 will do.
    """
    _check(compositions, delta)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"epsilon must be positive and finite, got {epsilon}")
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, compositions, delta) > epsilon:
        low, high = high, 2 * high
        if high > _MAX_NOISE_MULTIPLIER:
            raise FedmeshError(Code.PRIVACY_REFUSED, "no usable amount of noise gives this epsilon and delta")
    while high - low > _RELATIVE_ROUNDING / 10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, compositions, delta) > epsilon else (low, middle)
    return high


@lru_cache(maxsize=1024)
def calibrate(epsilon: float, delta: float, compositions: int) -> float:
    """Least noise multiplier, rounded up, for which `epsilon_of(result, compositions, delta) <= epsilon`.

    Starts from the closed form and steps up by 1e-6 (relative), then by ever larger steps, until the PLD accountant
    agrees.

    Raises:
        FedmeshError: as `gaussian_multiplier`.
    """
    multiplier, step = gaussian_multiplier(epsilon, delta, compositions), _RELATIVE_ROUNDING
    while epsilon_of(multiplier, compositions, delta) > epsilon:
        multiplier *= 1 + step
        step *= 2
    return multiplier


def discretisation_log_ratio(share_sigma: float, shares: int) -> float:
    """Bound on |ln P/Q| a value: `shares` discrete Gaussian shares against the rounded Gaussian (module docstring).

    Raises:
        FedmeshError: PRIVACY_REFUSED if `share_sigma` < 4, where the bound would not be negligible.
    """
    require_share_sigma(share_sigma)
    return sum_log_ratio(share_sigma, shares) + _rounding_log_ratio(ROUNDING_SIGMA)


def sum_log_ratio(share_sigma: float, shares: int) -> float:
    """tau of step 1 in the module docstring; the theorem holds for `share_sigma` >= 1/2."""
    return 10 * math.fsum(math.exp(-2 * (math.pi * share_sigma) ** 2 * j / (j + 1)) for j in range(1, shares))


def _rounding_log_ratio(sigma: float) -> float:
    tail = math.exp(-2 * (math.pi * sigma) ** 2)
    eta = 2 * tail / (1 - tail)
    return 2 * math.atanh(eta)


def discretisation_delta(share_sigma: float, shares: int, dimension: int, compositions: int, epsilon: float) -> float:
    """The part of delta that the discrete, shared noise may use up over a whole plan.

    If the ideal mechanism is (epsilon, d0)-DP and the real one is within a factor e^kappa of it on every outcome, the
    real one is (epsilon, d0 + (1 + e^epsilon)(e^kappa - 1))-DP: any event's probability moves by at most e^kappa - 1.

    Args:
        share_sigma: sigma of one share, integer units, at least 4.
        shares: honest shares in the sum, t - f; more only add independent noise.
        dimension: values a round.
        compositions: rounds.

    Raises:
        FedmeshError: PRIVACY_REFUSED if `share_sigma` < 4.
    """
    kappa = dimension * compositions * discretisation_log_ratio(share_sigma, shares)
    return (1 + math.exp(epsilon)) * math.expm1(kappa)


def require_share_sigma(share_sigma: float) -> None:
    """Refuse shares too fine for the integer grid.

    Raises:
        FedmeshError: PRIVACY_REFUSED if `share_sigma` < 4 integer units.
    """
    if not share_sigma >= MIN_SHARE_SIGMA:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"a noise share would have sigma {share_sigma:.3g} integer units, at least {MIN_SHARE_SIGMA:g} are needed: "
            "raise the plan's integer scale",
            share_sigma=share_sigma,
        )


def _check(compositions: int, delta: float) -> None:
    if compositions < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"compositions must be at least 1, got {compositions}")
    if not 0 < delta < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"delta must lie strictly between 0 and 1, got {delta}")


def _log_normal_cdf(x: float) -> float:
    """ln Phi(x), without underflow for very negative x (asymptotic series, Abramowitz and Stegun 26.2.12)."""
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + math.log(series)
