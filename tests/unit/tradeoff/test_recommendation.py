import pytest

from services.privacy.budget import DEFAULT_LIMIT, Remaining
from services.tradeoff.curve import Curve, band_of
from services.tradeoff.recommendation import Recommendation, knee, least_kept, recommend
from tests.support.curves import curve

# Against .70 / .30 without privacy and chance .50 / .10, 90 % of the gain is .68 / .28.
RISING = {0.1: (0.60, 0.20), 0.3: (0.66, 0.27), 0.5: (0.69, 0.29), 2.0: (0.70, 0.30)}


def chosen(drawn: Curve, keep: float = 0.9, left: dict[str, Remaining] | None = None) -> Recommendation:
    return recommend(drawn, keep, 1e-6, DEFAULT_LIMIT, left or {})


def reasons(found: Recommendation) -> str:
    return "\n".join(found.reasons)


def test_the_smallest_epsilon_that_keeps_enough() -> None:
    found = chosen(curve(RISING))
    assert (found.epsilon, found.rule, found.fits_default) == (0.5, "keeps", True)
    assert "leaves nothing of it" in reasons(found)
    assert "above the mean hospital alone" in reasons(found)
    assert "changes AUROC by +0.0100 and AUPRC by +0.0100" in reasons(found)
    assert "together, AUPRC is +132%" in reasons(found)
    lenient = chosen(curve(RISING), keep=0.7)
    assert lenient.epsilon == 0.3
    assert "leaves 0.2 of it" in reasons(lenient)


def test_the_lower_bound_decides_and_not_the_mean() -> None:
    assert chosen(curve(RISING, spread=0.02)).rule == "knee"
    assert chosen(curve(RISING, spread=0.02, runs=1)).epsilon == 0.5


def test_both_figures_must_keep_enough() -> None:
    assert chosen(curve({**RISING, 0.5: (0.70, 0.25)})).epsilon == 2.0


def test_more_than_the_default_budget_needs_two_people() -> None:
    found = chosen(curve({**RISING, 0.5: (0.67, 0.27)}))
    assert (found.epsilon, found.fits_default) == (2.0, False)
    assert "two approvers" in reasons(found)
    assert "Within it epsilon 0.5 has AUROC 0.6700, AUPRC 0.2700" in reasons(found)
    assert "the largest epsilon of the grid" in reasons(found)


def test_where_nothing_keeps_enough_the_curve_decides() -> None:
    low = {0.1: (0.55, 0.12), 0.3: (0.62, 0.15), 1.0: (0.63, 0.16), 2.0: (0.635, 0.16)}
    assert (chosen(curve(low)).epsilon, chosen(curve(low)).rule) == (0.3, "knee")
    two = {0.1: (0.55, 0.12), 0.3: (0.62, 0.15)}
    assert (chosen(curve(two)).epsilon, chosen(curve(two)).rule) == (0.3, "best")


def test_a_model_that_is_worse_than_a_hospital_alone_is_told() -> None:
    worse = {0.1: (0.55, 0.12), 0.3: (0.56, 0.13), 1.0: (0.57, 0.13)}
    assert "below the mean hospital alone" in reasons(chosen(curve(worse)))
    mixed = {0.1: (0.65, 0.17), 0.3: (0.66, 0.17), 1.0: (0.67, 0.17)}
    assert "not clearly above the mean hospital alone" in reasons(chosen(curve(mixed)))


def test_ledgers_that_were_shown_are_asked() -> None:
    left = {"north": Remaining(0.5, 1e-5), "south": Remaining(0.2, 1e-5), "west": Remaining(0.5, 1e-7)}
    text = reasons(chosen(curve(RISING), left=left))
    assert "north has epsilon 0.5 left by its ledger and the default limit: it fits" in text
    assert "south has epsilon 0.2 left by its ledger and the default limit: it does not fit" in text
    assert "west has epsilon 0.5 left by its ledger and the default limit: it does not fit" in text


def test_one_run_says_that_there_is_no_band() -> None:
    assert "no band" in reasons(chosen(curve(RISING, runs=1)))
    assert "no band" not in reasons(chosen(curve(RISING)))


def test_the_band_is_students_interval_of_the_mean() -> None:
    # t with 2 degrees of freedom at 97.5 %: 4.3027.
    band = band_of([1.0, 2.0, 3.0])
    assert (band.mean, band.sd) == (2.0, 1.0)
    assert band.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    assert band.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)
    one = band_of([0.6])
    assert (one.mean, one.floor, one.sd, one.low, one.high) == (0.6, 0.6, None, None, None)


def test_the_knee_is_farthest_above_the_chord() -> None:
    assert knee([0.1, 1, 10], [0.5, 0.65, 0.7]) == 1
    assert knee([0.1, 1, 10], [0.5, 0.55, 0.7]) is None
    assert knee([0.1, 1, 10], [0.7, 0.65, 0.6]) is None
    assert knee([0.1, 1], [0.5, 0.6]) is None


def test_the_share_that_is_kept_is_the_smaller_one() -> None:
    [point] = curve({1.0: (0.66, 0.28)}, runs=1).points
    assert least_kept(point, curve({1.0: (0.66, 0.28)}, runs=1)) == pytest.approx(0.8)
