"""GF(2^128): polynomials over GF(2) modulo x^128 + x^7 + x^2 + x + 1; bit i of an integer is the coefficient of x^i.

CPython has no carry-less product, so one is taken from its product of integers (Kronecker substitution): `spread` gives
every bit a byte of its own, in which a product counts how many pairs of bits meet at that power of x. At most 128 do,
so no byte overflows into the next, and the lowest bits of the bytes are the carry-less product. Those of several
products may be added by XOR before any is read, hence `dot`.

What is secret enters by `guard` and `dot` only, where no branch and no table index of ours depends on it; docs/adr/0011
says what is left. Everything else is for public values and does branch on them.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import xor
from typing import Final

BITS: Final = 128
BYTES: Final = BITS // 8

_POLYNOMIAL: Final = (1 << BITS) | 0x87
_SPREAD_BYTES: Final = 2 * BITS
_LOWEST: Final = int.from_bytes(b"\x01" * _SPREAD_BYTES, "big")
_DIGITS: Final = int.from_bytes(b"0" * _SPREAD_BYTES, "big")
_GUARD_SHIFT: Final = 8 * BITS
_GUARD: Final = 1 << _GUARD_SHIFT


def spread(element: int) -> int:
    """The element with every bit in a byte of its own."""
    return int.from_bytes(format(element, "0128b").encode("ascii"), "big") & _LOWEST


def guard(element: int) -> int:
    """A secret element, spread, with x^128 added: CPython's products depend on lengths, and so all have one."""
    return spread(element) | _GUARD


def dot(public: Sequence[int], secret: Iterable[int]) -> int:
    """The sum of the products of spread elements with guarded ones, pair by pair; an element, not spread."""
    # What the guards brought in, the sum of the public elements times x^128, is taken out again.
    products = (a * b for a, b in zip(public, secret, strict=True))
    counted = reduce(xor, products, reduce(xor, public, 0) << _GUARD_SHIFT) & _LOWEST
    return _reduce(int((counted | _DIGITS).to_bytes(_SPREAD_BYTES, "big"), 2))


def multiply(a: int, b: int) -> int:
    """The product of two elements."""
    return dot((spread(a),), (guard(b),))


def product(elements: Iterable[int]) -> int:
    """The product of public elements, by shifting and adding: quick for small ones."""
    total = 1
    for element in elements:
        shifted = 0
        while element:
            lowest = element & -element
            shifted ^= total * lowest
            element ^= lowest
        total = _reduce(shifted) if shifted >> BITS else shifted
    return total


def inverse(element: int) -> int:
    """1 / element, for a public one below 2^128: the extended Euclidean algorithm.

    Raises: ValueError for 0.
    """
    if not element:
        raise ValueError("0 has no inverse")
    a, b, of_a, of_b = element, _POLYNOMIAL, 1, 0
    # Always: element * of_a = a and element * of_b = b, modulo the polynomial.
    while a != 1:
        shift = a.bit_length() - b.bit_length()
        if shift < 0:
            a, b, of_a, of_b, shift = b, a, of_b, of_a, -shift
        a ^= b << shift
        of_a ^= of_b << shift
    return of_a


def _reduce(product: int) -> int:
    # x^128 = x^7 + x^2 + x + 1. The first time leaves at most 7 bits too many, the second none.
    for _ in range(2):
        high = product >> BITS
        product = product ^ (high << BITS) ^ high ^ (high << 1) ^ (high << 2) ^ (high << 7)
    return product
