import itertools
import math

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.privacy import accounting


def exact_delta(noise_multiplier: float, epsilon: float) -> float:
    """Balle and Wang 2018, theorem 8, with 50 digits."""
    with mpmath.workdps(50):
        mu, eps = 1 / mpmath.mpf(noise_multiplier), mpmath.mpf(epsilon)
        left, right = mpmath.ncdf(mu / 2 - eps / mu), mpmath.ncdf(-mu / 2 - eps / mu)
        return float(left - mpmath.exp(eps) * right)


def test_published_values() -> None:
    # Dong, Roth and Su 2022: a 1-GDP mechanism is (1, 0.126936...)-DP.
    assert accounting.gaussian_delta(1.0, 1.0) == pytest.approx(0.126936737507, rel=1e-10)
    # Analytic Gaussian mechanism at epsilon 1, delta 1e-5; the classical formula gives 4.84.
    assert accounting.calibrate(1.0, 1e-5, 1) == pytest.approx(3.730632, rel=2e-6)


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5, 3.0])
def test_the_closed_form_against_fifty_digits(multiplier: float, epsilon: float) -> None:
    assert accounting.gaussian_delta(multiplier, epsilon) == pytest.approx(
        exact_delta(multiplier, epsilon), rel=1e-6, abs=1e-15
    )


@pytest.mark.parametrize(("multiplier", "rounds"), [(0.5, 1), (1.0, 1), (5.0, 10), (20.0, 50), (300.0, 200)])
def test_pld_agrees_with_the_closed_form_and_never_understates(multiplier: float, rounds: int) -> None:
    pld = accounting.epsilon_of(multiplier, rounds, 1e-6)
    closed = accounting.gaussian_epsilon(multiplier, rounds, 1e-6)
    assert pld == pytest.approx(closed, rel=1e-4)
    assert exact_delta(multiplier / math.sqrt(rounds), closed) <= 1e-6
    assert exact_delta(multiplier / math.sqrt(rounds), pld) <= 1e-6 * (1 + 1e-5)


def test_composition_agrees_with_composing_the_pld_itself() -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    composed = pld.from_gaussian_mechanism(12.0, value_discretization_interval=1e-4).self_compose(20)
    assert accounting.epsilon_of(12.0, 20, 1e-6) == pytest.approx(composed.get_epsilon_for_delta(1e-6), rel=2e-3)


@pytest.mark.parametrize("rounds", [1, 7, 100])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_calibration_keeps_its_promise_and_is_tight(epsilon: float, rounds: int) -> None:
    multiplier = accounting.calibrate(epsilon, 1e-6, rounds)
    assert accounting.epsilon_of(multiplier, rounds, 1e-6) <= epsilon
    assert accounting.epsilon_of(multiplier * (1 - 1e-4), rounds, 1e-6) > epsilon


def test_calibration_is_monotone() -> None:
    by_epsilon = [accounting.calibrate(e, 1e-6, 10) for e in (0.1, 0.2, 0.5, 1.0, 4.0)]
    by_delta = [accounting.calibrate(0.5, d, 10) for d in (1e-9, 1e-7, 1e-6, 1e-4)]
    by_rounds = [accounting.calibrate(0.5, 1e-6, k) for k in (1, 2, 10, 50)]
    assert all(a > b for series in (by_epsilon, by_delta) for a, b in itertools.pairwise(series))
    assert all(a < b for a, b in itertools.pairwise(by_rounds))


@pytest.mark.parametrize(
    ("epsilon", "delta", "rounds"),
    [(0.0, 1e-6, 1), (-0.5, 1e-6, 1), (math.nan, 1e-6, 1), (math.inf, 1e-6, 1), (0.5, 0.0, 1), (0.5, 1.0, 1),
     (0.5, math.nan, 1), (0.5, 1e-6, 0)],
)  # fmt: skip
def test_impossible_promises_are_refused(epsilon: float, delta: float, rounds: int) -> None:
    with pytest.raises(FedmeshError) as caught:
        accounting.calibrate(epsilon, delta, rounds)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.nan])
def test_bad_multipliers_are_refused(multiplier: float) -> None:
    for account in (accounting.epsilon_of, accounting.gaussian_epsilon):
        with pytest.raises(FedmeshError):
            account(multiplier, 1, 1e-6)


def grid(sigma: float, reach: int) -> np.ndarray:  # type: ignore[type-arg]
    k = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-(k**2) / (2 * sigma**2))
    return weights / weights.sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("sigma", "shares"), [(0.5, 2), (0.6, 4), (0.7, 7), (0.8, 3)])
def test_the_bound_on_summed_shares_holds_and_is_not_idle(sigma: float, shares: int) -> None:
    reach = 30
    total = single = grid(sigma, reach)
    for _ in range(shares - 1):
        total = np.convolve(total, single)
    ideal = grid(sigma * math.sqrt(shares), reach * shares)
    likely = ideal > 1e-10
    ratio = np.abs(np.log(total[likely] / ideal[likely])).max()
    bound = accounting.sum_log_ratio(sigma, shares)
    assert ratio <= bound
    assert ratio > bound / 100


def test_the_bound_on_rounding_a_gaussian_holds_and_is_not_idle() -> None:
    rounding, total = 0.5, 0.7
    spread = math.sqrt(total**2 - rounding**2)
    w = np.linspace(-15, 15, 300_001)
    density = np.exp(-(w**2) / (2 * spread**2)) / (spread * math.sqrt(2 * math.pi))
    k = np.arange(-40, 41)
    normaliser = np.exp(-((k[:, None] - w) ** 2) / (2 * rounding**2)).sum(axis=0)
    ideal = grid(total, 40)
    worst = 0.0
    for value in range(-4, 5):
        chance = np.exp(-((value - w) ** 2) / (2 * rounding**2)) / normaliser
        real = np.trapz(density * chance, w)
        worst = max(worst, abs(math.log(real / ideal[value + 40])))
    bound = accounting._rounding_log_ratio(rounding)
    assert bound / 100 < worst <= bound


def test_the_reserve_is_negligible_for_four_units_and_refused_below() -> None:
    reserve = accounting.discretisation_delta(4.0, 7, 1 << 27, 10_000, 0.5)
    assert 0 < reserve < 1e-20
    with pytest.raises(FedmeshError, match="integer scale") as caught:
        accounting.discretisation_delta(3.99, 7, 10, 1, 0.5)
    assert caught.value.code is Code.PRIVACY_REFUSED
