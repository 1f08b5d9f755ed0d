import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Code, FedmeshError
from services.privacy.budget import Charge, Limit, Remaining, remaining, require_attempt, require_budget

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def charge(job: str, epsilon: float, delta: float = 1e-6, days_ago: float = 0, population: str = "h1") -> Charge:
    return Charge(job, population, epsilon, delta, NOW - timedelta(days=days_ago))


def test_all_of_it_can_be_spent_and_no_more() -> None:
    assert remaining([], "h1", NOW) == Remaining(0.5, 1e-5)
    assert require_budget([], charge("a", 0.5), NOW) == Remaining(0.0, 9e-6)
    with pytest.raises(FedmeshError) as caught:
        require_budget([charge("a", 0.5)], charge("b", 1e-6), NOW)
    assert caught.value.code is Code.BUDGET_EXHAUSTED
    assert not caught.value.retryable


def test_a_refusal_names_job_population_asked_and_left() -> None:
    with pytest.raises(
        FedmeshError, match=r"job b asks epsilon 0\.3 .* population h1, which has epsilon 0\.2"
    ) as caught:
        require_budget([charge("a", 0.3)], charge("b", 0.3), NOW)
    assert caught.value.detail["job_id"] == "b"
    assert caught.value.detail["population"] == "h1"
    assert caught.value.detail["asked_epsilon"] == "0.3"
    assert caught.value.detail["left_epsilon"] == "0.2"


def test_floating_point_dust_neither_refuses_nor_overspends() -> None:
    spent = [charge("a", 0.1), charge("b", 0.2)]
    assert 0.1 + 0.2 + 0.2 > 0.5 - 1e-16
    assert require_budget(spent, charge("c", 0.2), NOW).epsilon == 0.0
    assert require_budget([], charge("a", math.nextafter(0.5, 1)), NOW).epsilon == 0.0
    assert require_budget([], charge("a", 0.5 + 1e-13), NOW).epsilon == 0.0
    with pytest.raises(FedmeshError):
        require_budget([], charge("a", 0.5 + 1e-9), NOW)
    tenths = [charge(str(i), 0.05) for i in range(9)]
    assert require_budget(tenths, charge("last", 0.05), NOW).epsilon == 0.0


def test_the_window_rolls() -> None:
    old = [charge("a", 0.5, days_ago=365)]
    recent = [charge("a", 0.5, days_ago=364.99)]
    assert remaining(old, "h1", NOW).epsilon == 0.5
    assert remaining(recent, "h1", NOW).epsilon == 0.0


def test_a_future_charge_counts() -> None:
    assert remaining([charge("a", 0.5, days_ago=-1)], "h1", NOW).epsilon == 0.0


def test_populations_are_separate() -> None:
    spent = [charge("a", 0.5, population="h2")]
    assert remaining(spent, "h1", NOW).epsilon == 0.5
    assert remaining(spent, "h2", NOW).epsilon == 0.0


def test_asking_again_for_the_same_job_is_not_charged_twice() -> None:
    assert require_budget([charge("a", 0.5)], charge("a", 0.5), NOW).epsilon == 0.0


def test_delta_is_limited_too() -> None:
    with pytest.raises(FedmeshError, match="delta"):
        require_budget([charge("a", 0.1, delta=9.5e-6)], charge("b", 0.1, delta=1e-6), NOW)


def test_a_lowered_limit_never_leaves_less_than_nothing() -> None:
    assert remaining([charge("a", 0.5)], "h1", NOW, Limit(0.2, 1e-7)) == Remaining(0.0, 0.0)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (-0.1, 0.0), (math.nan, 0.0), (math.inf, 0.0), (0.1, -1.0)])
def test_senseless_amounts_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(FedmeshError) as caught:
        require_budget([], charge("a", epsilon, delta), NOW)
    assert caught.value.code is Code.INVALID_ARGUMENT


@given(st.lists(st.floats(1e-9, 0.6), max_size=30))
def test_whatever_is_asked_the_limit_holds(asked: list[float]) -> None:
    accepted: list[Charge] = []
    for i, epsilon in enumerate(asked):
        wanted = charge(str(i), epsilon, delta=0.0)
        try:
            left = require_budget(accepted, wanted, NOW)
        except FedmeshError:
            assert math.fsum([epsilon, *(c.epsilon for c in accepted)]) > 0.5 - 1e-7
        else:
            accepted.append(wanted)
            assert left == remaining(accepted, "h1", NOW)
    assert math.fsum(c.epsilon for c in accepted) <= 0.5 + 1e-10


def test_attempts_run_out() -> None:
    assert require_attempt("a", 0, 2) == 1
    assert require_attempt("a", 1, 2) == 0
    with pytest.raises(FedmeshError, match="all 2 attempts") as caught:
        require_attempt("a", 2, 2)
    assert caught.value.code is Code.BUDGET_EXHAUSTED
