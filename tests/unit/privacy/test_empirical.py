"""Bounds from error counts: against SciPy's own interval, and their error probabilities against enumeration."""

import math

import pytest
from scipy.stats import binom, binomtest, norm

from services.common.errors import Code, FedmeshError
from services.privacy.empirical import chances, claimed_mu, epsilon_of_mu, mu_lower_bound


@pytest.mark.parametrize(("errors", "runs"), [((900, 880), 2000), ((0, 0), 2000), ((1, 1999), 2000), ((3, 4), 10)])
def test_the_bound_is_clopper_and_pearsons(errors: tuple[int, int], runs: int) -> None:
    uppers = [binomtest(count, runs).proportion_ci(0.9 if count < runs else 0.95, "exact").high for count in errors]
    expected = sum(norm.isf(upper) for upper in uppers)
    # Each limit is wrong on its one side with probability 5 %, both together with 10 % at most.
    assert mu_lower_bound(*errors, runs, 0.9) == pytest.approx(expected, rel=1e-9)


def test_an_attack_that_is_always_wrong_proves_nothing() -> None:
    assert mu_lower_bound(10, 0, 10, 0.95) == -math.inf
    assert epsilon_of_mu(-math.inf, 1e-6) == 0
    assert epsilon_of_mu(0.0, 1e-6) == 0


def test_the_claim_is_the_epsilon_of_its_mu() -> None:
    mu = claimed_mu(0.5, 1e-6)
    assert epsilon_of_mu(mu, 1e-6) == pytest.approx(0.5, abs=1e-6)
    assert epsilon_of_mu(2 * mu, 1e-6) == pytest.approx(1.0525, abs=1e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_the_probability_of_a_wrong_verdict_is_exact(paired: bool) -> None:
    runs, claimed, worse, confidence = 30, 1.2, 2.6, 0.8

    def above(mu: float) -> float:
        rate = float(norm.sf(mu / 2))
        total = 0.0
        for positives in range(runs + 1):
            for negatives in range(runs + 1 - positives if paired else runs + 1):
                left, conditional = (runs - positives, rate / (1 - rate)) if paired else (runs, rate)
                weight = binom.pmf(positives, runs, rate) * binom.pmf(negatives, left, conditional)
                total += weight * (mu_lower_bound(positives, negatives, runs, confidence) > claimed)
        return total

    found = chances(runs, claimed, worse, confidence, paired=paired)
    assert found.false_alarm == pytest.approx(above(claimed), rel=1e-9)
    assert found.missed == pytest.approx(1 - above(worse), rel=1e-9)
    # A bound of 80 % confidence is wrong in a fifth of all cases at most, and says something.
    assert found.false_alarm < 0.2
    assert 0.001 < found.missed < 0.9


@pytest.mark.parametrize(
    ("counts", "confidence"),
    [((-1, 0, 10), 0.95), ((0, 11, 10), 0.95), ((0, 0, 0), 0.95), ((1, 1, 10), 0.0), ((1, 1, 10), 1.0)],
)
def test_counts_and_confidences_out_of_range_are_refused(counts: tuple[int, int, int], confidence: float) -> None:
    with pytest.raises(FedmeshError) as caught:
        mu_lower_bound(*counts, confidence)
    assert caught.value.code is Code.INVALID_ARGUMENT
