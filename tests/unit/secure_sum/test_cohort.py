import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum import cohort


@pytest.mark.parametrize(
    ("n", "t", "f", "shares"), [(4, 3, 1, 2), (5, 4, 2, 2), (6, 5, 3, 2), (7, 5, 2, 3), (10, 7, 3, 4), (15, 11, 4, 7)]
)
def test_the_numbers_of_a_cohort(n: int, t: int, f: int, shares: int) -> None:
    assert (cohort.threshold(n), cohort.colluders(n), cohort.noise_share_divisor(n, f)) == (t, f, shares)
    assert [cohort.tolerated(n, asked) for asked in (None, 0, f)] == [f, 0, f]
    assert cohort.noise_share_divisor(n, 0) == t


@pytest.mark.parametrize("n", range(4, 101))
def test_two_quorums_share_an_honest_hospital_and_noise_is_left(n: int) -> None:
    t, f = cohort.threshold(n), cohort.colluders(n)
    assert 2 * t - n > f
    assert t - f >= 2
    assert f >= 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_privacy_refuses_a_small_cohort(n: int) -> None:
    with pytest.raises(FedmeshError, match="at least 4") as caught:
        cohort.noise_share_divisor(n, 0)
    assert caught.value.code is Code.PRIVACY_REFUSED


def test_an_empty_cohort_is_refused() -> None:
    with pytest.raises(FedmeshError) as caught:
        cohort.threshold(0)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(("n", "asked", "code"), [(15, 5, Code.PRIVACY_REFUSED), (4, 2, Code.PRIVACY_REFUSED),
                                                  (15, -1, Code.INVALID_ARGUMENT)])  # fmt: skip
def test_a_guarantee_that_the_cohort_cannot_give_is_refused(n: int, asked: int, code: Code) -> None:
    with pytest.raises(FedmeshError) as caught:
        cohort.tolerated(n, asked)
    assert caught.value.code is code
