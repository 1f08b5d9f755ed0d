import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding
from services.secure_sum.encoding import Int64Vector
from services.secure_sum.parameters import DEFAULT, parameter_set


@st.composite
def lane_vectors(draw: st.DrawFn) -> tuple[int, Int64Vector]:
    lanes = draw(st.sampled_from(encoding.LANES))
    half = 1 << (encoding.lane_bits(DEFAULT, lanes) - 1)
    values = st.one_of(st.integers(-half, half - 1), st.sampled_from([-half, half - 1, -1, 0, 1]))
    return lanes, draw(hnp.arrays(np.int64, st.integers(1, 50), elements=values))


@given(lane_vectors())
def test_round_trip_with_negatives_and_extremes(case: tuple[int, Int64Vector]) -> None:
    lanes, values = case
    coefficients = encoding.encode(values, DEFAULT, lanes)
    assert int(coefficients.max()) < DEFAULT.plain_modulus
    assert np.array_equal(encoding.decode(coefficients, DEFAULT, lanes, values.size), values)


@given(st.lists(lane_vectors(), min_size=2, max_size=2))
@settings(max_examples=50)
def test_coefficients_add_as_values_do(cases: list[tuple[int, Int64Vector]]) -> None:
    lanes = cases[0][0]
    a, b = (np.resize(v, 40) // 2 % (1 << (encoding.lane_bits(DEFAULT, lanes) - 2)) for _, v in cases)
    b = -b
    total = (encoding.encode(a, DEFAULT, lanes) + encoding.encode(b, DEFAULT, lanes)) % np.uint64(DEFAULT.plain_modulus)
    assert np.array_equal(encoding.decode(total, DEFAULT, lanes, 40), a + b)


@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 8191, 8192, 8193])
def test_sizes_around_a_ciphertext(lanes: int, size: int) -> None:
    values = np.arange(size, dtype=np.int64) - size // 2
    coefficients = encoding.encode(values, DEFAULT, lanes)
    assert coefficients.shape == (-(-size // (4096 * lanes)), 4096)
    assert np.array_equal(encoding.decode(coefficients, DEFAULT, lanes, size), values)


@pytest.mark.parametrize("lanes", encoding.LANES)
def test_the_contribution_limit_is_tight(lanes: int) -> None:
    half = 1 << (encoding.lane_bits(DEFAULT, lanes) - 1)
    for n in range(1, 17):
        limit = encoding.contribution_limit(DEFAULT, lanes, n)
        assert n * limit <= half - 1 < n * (limit + 1)
        assert encoding.fits(np.array([limit, -limit]), DEFAULT, lanes, n)
        assert not encoding.fits(np.array([0, limit + 1]), DEFAULT, lanes, n)
        assert not encoding.fits(np.array([-limit - 1, 0]), DEFAULT, lanes, n)


def test_a_contribution_that_could_overflow_is_refused_with_its_limit() -> None:
    with pytest.raises(FedmeshError, match="559240") as caught:
        encoding.require_fits(np.array([559241]), DEFAULT, 2, 15)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("bad", [1 << 23, -(1 << 23) - 1, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
def test_a_value_outside_its_lane_is_refused(bad: int) -> None:
    with pytest.raises(FedmeshError, match="24-bit"):
        encoding.encode(np.array([0, bad]), DEFAULT, 2)


@pytest.mark.parametrize(
    "values", [np.zeros((2, 2), np.int64), np.zeros(3, np.int32), np.zeros(3), np.zeros(0, np.int64)]
)
def test_bad_arrays_are_refused(values: Int64Vector) -> None:
    with pytest.raises(FedmeshError):
        encoding.encode(values, DEFAULT, 2)


@pytest.mark.parametrize(("lanes", "hospitals"), [(0, 4), (3, 4), (2, 0), (2, 17)])
def test_bad_lanes_and_cohorts_are_refused(lanes: int, hospitals: int) -> None:
    with pytest.raises(FedmeshError):
        encoding.contribution_limit(DEFAULT, lanes, hospitals)


def test_lanes_follow_the_noise() -> None:
    room = (1 << 23) - 1
    assert encoding.choose_lanes(DEFAULT, room // 15, 15, 0.0, 2000) == 2
    assert encoding.choose_lanes(DEFAULT, room // 15 + 1, 15, 0.0, 2000) == 1
    # sqrt(2 ln(2 * 2000 * 2^40)) = 8.49 standard deviations must fit.
    edge = room / 8.49 / 15**0.5
    assert encoding.choose_lanes(DEFAULT, 0, 15, edge * 0.99, 2000) == 2
    assert encoding.choose_lanes(DEFAULT, 0, 15, edge * 1.01, 2000) == 1
    with pytest.raises(FedmeshError, match="integer scale"):
        encoding.choose_lanes(DEFAULT, 1 << 46, 15, 0.0, 2000)


def test_parameter_sets_are_found_by_name_only() -> None:
    assert parameter_set("bfv-n4096-q60-t48-v2") is DEFAULT
    with pytest.raises(FedmeshError, match="bfv-n4096-q60-t48-v2"):
        parameter_set("bfv-n4096-q60-t48-v1")
