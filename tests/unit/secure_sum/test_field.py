"""Held against PyCryptodome's field, which is what the first shares were made in."""

from Crypto.Protocol.SecretSharing import _Element
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.secure_sum import field

ALL_ONES = (1 << 128) - 1
elements = st.integers(0, ALL_ONES) | st.integers(0, 64) | st.integers(0, 127).map(lambda bit: 1 << bit)


def reference(*factors: int) -> int:
    product = _Element(1)
    for factor in factors:
        product *= _Element(factor)
    return int(product)


@given(elements, elements)
@example(ALL_ONES, ALL_ONES)
@example(1 << 127, 1 << 127)
@example(0, ALL_ONES)
def test_a_product_is_the_reference_s(a: int, b: int) -> None:
    assert field.multiply(a, b) == field.multiply(b, a) == field.product((a, b)) == reference(a, b)


@settings(max_examples=30)
@given(st.lists(st.tuples(elements, elements), max_size=64))
@example([(ALL_ONES, ALL_ONES)] * 64)
@example([(ALL_ONES, ALL_ONES)] * 63)
def test_products_are_summed(pairs: list[tuple[int, int]]) -> None:
    expected = 0
    for a, b in pairs:
        expected ^= reference(a, b)
    assert field.dot([field.spread(a) for a, _ in pairs], [field.guard(b) for _, b in pairs]) == expected


@settings(max_examples=30)
@given(st.lists(elements, max_size=12))
def test_a_product_of_many_is_the_reference_s(factors: list[int]) -> None:
    assert field.product(factors) == reference(*factors)


@given(elements.filter(bool))
@example(1)
@example(ALL_ONES)
def test_an_inverse_is_the_reference_s(a: int) -> None:
    assert field.inverse(a) == int(_Element(a).inverse())
    assert field.multiply(a, field.inverse(a)) == 1


@given(elements)
def test_guarded_elements_are_all_as_long(a: int) -> None:
    assert field.guard(a).bit_length() == field.guard(0).bit_length()
