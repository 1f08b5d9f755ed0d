import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Code, FedmeshError
from services.secure_sum import masks

PLAN = tuple((bytes([i]) * 32, 1 if i % 2 else -1) for i in range(5))


@given(st.integers(0, 20_000).map(lambda block: 8 * block), st.integers(0, 70_000))
@settings(max_examples=25, deadline=None)
def test_any_part_of_a_mask_is_the_part_of_the_whole(start: int, count: int) -> None:
    whole = masks.coefficients(PLAN, 0, start + count)
    part = masks.coefficients(PLAN, start, count)
    assert part.dtype == np.uint64
    np.testing.assert_array_equal(part, whole[start:])
    assert part.max(initial=0) < 1 << 48


def test_streams_of_both_signs_add_up_to_nothing() -> None:
    key = os.urandom(32)
    assert not masks.coefficients(((key, 1), (key, -1)), 65_536, 100_000).any()


def test_a_plan_is_the_sum_of_its_streams() -> None:
    parts = [masks.coefficients((step,), 65_536, 70_000) for step in PLAN]
    expected = sum(parts, start=np.zeros(1, dtype=np.uint64)) % np.uint64(1 << 48)
    np.testing.assert_array_equal(masks.coefficients(PLAN, 65_536, 70_000), expected)


def test_a_mask_looks_uniform() -> None:
    values = masks.coefficients(((os.urandom(32), 1),), 0, 1 << 16)
    ones = sum(((values >> np.uint64(bit)) & np.uint64(1)).sum() for bit in range(48))
    # 6 standard deviations of 48 * 2^16 fair bits.
    assert abs(int(ones) - 24 * (1 << 16)) < 6 * (12 * (1 << 16)) ** 0.5


def test_no_keys_no_mask() -> None:
    assert masks.coefficients((), 0, 10).tolist() == [0] * 10


def test_the_generator_ends_where_its_block_counter_does() -> None:
    last = (1 << 35) - 8
    assert masks.coefficients(PLAN, last, 8).size == 8
    for start, count in ((last, 9), (4, 8), (-8, 8), (0, -1)):
        with pytest.raises(FedmeshError) as caught:
            masks.coefficients(PLAN, start, count)
        assert caught.value.code is Code.INVALID_ARGUMENT
