import itertools
import math
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from services.common.errors import Code, FedmeshError
from services.privacy import accounting
from services.privacy.noise import Guarantee, discrete_gaussian, plan_noise

PLAN = {"epsilon": 0.5, "delta": 1e-6, "compositions": 30, "sensitivity": 1000, "dimension": 2049}


def chi_square(draws: npt.NDArray[np.int64], sigma: float) -> float:
    """Pearson's statistic over the cells -12..12 and both tails: 26 degrees of freedom."""
    k = np.arange(-200, 201)
    weights = np.exp(-(k.astype(float) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    clipped = np.clip(k, -13, 13)
    expected = np.array([weights[clipped == c].sum() for c in range(-13, 14)]) * draws.size
    counted = np.bincount(np.clip(draws, -13, 13) + 13, minlength=27)
    return float(((counted - expected) ** 2 / expected).sum())


def test_the_sampler_draws_discrete_gaussians() -> None:
    sigma, size = 4.0, 40_000
    draws = discrete_gaussian(sigma, size)
    assert draws.dtype == np.int64
    assert draws.shape == (size,)
    # 5.5 standard errors: fails by chance once in 10^7 runs.
    assert abs(draws.mean()) < 5.5 * sigma / math.sqrt(size)
    assert abs(draws.var() / sigma**2 - 1) < 5.5 * math.sqrt(2 / size)
    # P(chi-square with 26 degrees of freedom > 90) = 6e-9.
    assert chi_square(draws, sigma) < 90
    assert chi_square(draws, sigma * 1.05) > 90


def test_draws_differ_from_call_to_call() -> None:
    assert not np.array_equal(discrete_gaussian(1000.0, 50), discrete_gaussian(1000.0, 50))


@pytest.mark.parametrize(("sigma", "size"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, -1)])
def test_impossible_draws_are_refused(sigma: float, size: int) -> None:
    with pytest.raises(FedmeshError):
        discrete_gaussian(sigma, size)


def test_no_draws() -> None:
    assert discrete_gaussian(5.0, 0).shape == (0,)


@pytest.mark.parametrize(("hospitals", "shares", "colluders"), [(15, 7, 4), (4, 2, 1)])
def test_the_plan_of_a_cohort(hospitals: int, shares: int, colluders: int) -> None:
    plan = plan_noise(hospitals=hospitals, **PLAN)  # type: ignore[arg-type]
    assert plan.guarantee == Guarantee(0.5, 1e-6, colluders)
    assert plan.share_sigma == pytest.approx(plan.sigma / math.sqrt(shares))
    # What t - f shares give is at least the Gaussian that was accounted for, plus r^2.
    assert shares * plan.share_sigma**2 >= (plan.noise_multiplier * 1000) ** 2 + accounting.ROUNDING_SIGMA**2 - 1e-3
    assert accounting.epsilon_of(plan.noise_multiplier, 30, plan.accounted_delta) <= 0.5
    assert plan.accounted_delta <= 1e-6


def test_fewer_colluders_need_less_noise_and_the_guarantee_says_so() -> None:
    """f = 0: all eleven shares of the smallest sum count, so each is smaller; whoever knows one finds less."""
    usual, none = (plan_noise(hospitals=15, colluders=f, **PLAN) for f in (4, 0))  # type: ignore[arg-type]
    assert usual == plan_noise(hospitals=15, **PLAN)  # type: ignore[arg-type]
    assert str(none.guarantee) == "(epsilon 0.5, delta 1e-06, f 0)"
    assert none.sigma == pytest.approx(usual.sigma, rel=1e-6)
    assert none.share_sigma == pytest.approx(none.sigma / math.sqrt(11))
    assert none.share_sigma == pytest.approx(usual.share_sigma * math.sqrt(7 / 11), rel=1e-6)
    assert none.epsilon_against(0) == pytest.approx(0.5, abs=1e-6)
    assert usual.epsilon_against(0) < 0.5 < none.epsilon_against(1) < none.epsilon_against(4)
    with pytest.raises(FedmeshError, match="larger roster"):
        plan_noise(hospitals=4, colluders=2, **PLAN)  # type: ignore[arg-type]


def test_the_live_epsilon_grows_to_the_promise() -> None:
    plan = plan_noise(hospitals=15, **PLAN)  # type: ignore[arg-type]
    spent = [plan.epsilon_after(k) for k in range(32)]
    assert spent[0] == 0
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert spent[30] == pytest.approx(0.5, abs=1e-5)
    assert spent[30] <= 0.5 + 2e-9
    assert spent[31] > 0.5


def test_a_guarantee_is_told_whole_and_never_understated() -> None:
    assert str(Guarantee(0.5, 1e-6, 4)) == "(epsilon 0.5, delta 1e-06, f 4)"
    assert str(Guarantee(0.5 + 1e-9, 1e-6, 4)) == "(epsilon 0.5, delta 1e-06, f 4)"
    assert str(Guarantee(0.12341, 1e-6, 1)) == "(epsilon 0.1235, delta 1e-06, f 1)"
    plan = plan_noise(hospitals=15, **PLAN)  # type: ignore[arg-type]
    assert plan.guarantee_after(30) == Guarantee(plan.epsilon_after(30), 1e-6, 4)


def test_more_colluders_than_f_find_less_noise() -> None:
    plan = plan_noise(hospitals=15, **PLAN)  # type: ignore[arg-type]
    against = [plan.epsilon_against(number) for number in range(11)]
    assert against[4] == pytest.approx(0.5, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(against))
    # Ten of eleven know all shares but one: an update in the clear.
    assert against[10] == plan.epsilon_of_shares(1)
    single = accounting.epsilon_of(plan.noise_multiplier / math.sqrt(7), 30, plan.accounted_delta)
    assert against[10] == pytest.approx(single, rel=1e-4)
    for number in (-1, 11):
        with pytest.raises(FedmeshError):
            plan.epsilon_against(number)


def test_a_stated_multiplier_is_checked() -> None:
    good = plan_noise(hospitals=15, **PLAN)  # type: ignore[arg-type]
    again = plan_noise(hospitals=15, noise_multiplier=good.noise_multiplier, **PLAN)  # type: ignore[arg-type]
    assert again == good
    with pytest.raises(FedmeshError, match=r"more than the 0\.5") as caught:
        plan_noise(hospitals=15, noise_multiplier=good.noise_multiplier * 0.999, **PLAN)  # type: ignore[arg-type]
    assert caught.value.code is Code.PRIVACY_REFUSED


def test_checking_a_stated_multiplier_imports_no_accountant() -> None:
    code = (
        "import sys; from services.privacy.noise import plan_noise;"
        "p = plan_noise(epsilon=.5, delta=1e-6, compositions=30, sensitivity=1000, dimension=9, hospitals=15,"
        " noise_multiplier=50.); p.epsilon_after(3);"
        "bad = [m for m in ('scipy', 'dp_accounting', 'opendp', 'tenseal', 'tensorflow') if m in sys.modules];"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_coarse_grid_is_refused_with_advice() -> None:
    with pytest.raises(FedmeshError, match="raise the plan's integer scale") as caught:
        plan_noise(hospitals=15, **{**PLAN, "sensitivity": 0.1})  # type: ignore[arg-type]
    assert caught.value.code is Code.PRIVACY_REFUSED


def test_a_small_cohort_is_refused() -> None:
    with pytest.raises(FedmeshError) as caught:
        plan_noise(hospitals=3, **PLAN)  # type: ignore[arg-type]
    assert caught.value.code is Code.PRIVACY_REFUSED


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 0}, {"epsilon": -1}, {"epsilon": math.nan}, {"delta": 0}, {"delta": 1}, {"compositions": 0},
     {"sensitivity": 0}, {"sensitivity": math.nan}, {"dimension": 0}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(FedmeshError) as caught:
        plan_noise(hospitals=15, **{**PLAN, **change})  # type: ignore[arg-type]
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_delta_below_the_reserve_is_refused() -> None:
    with pytest.raises(FedmeshError, match="reserve") as caught:
        plan_noise(hospitals=15, **{**PLAN, "delta": 1e-60})  # type: ignore[arg-type]
    assert caught.value.code is Code.PRIVACY_REFUSED
