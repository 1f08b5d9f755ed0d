"""Arithmetic of ciphertext coefficients in numpy: what needs neither a key nor SEAL.

Adding a plaintext to a ciphertext is c0 += round(q * m / t), coefficient by coefficient, and adding ciphertexts is
c0 += c0', c1 += c1'. Both are exactly what SEAL does (`add_plain`, `add`), at the speed of memory, and so is the
rounding of a decryption.
"""

from typing import Final

import numpy as np

from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import ParameterSet

_WORD_BITS: Final = 64


def scale(plain: Coefficients, params: ParameterSet) -> Coefficients:
    """round(q * m / t), half up, below q, for uint64[n] of plaintext coefficients m in [0, t).

    With q = 2^b - g and t = 2^p this is m * 2^(b - p) + floor((t / 2 - g * m) / t); |g * m| < 2^62, so int64 holds it.
    """
    m = plain.view(np.int64)
    gap = (1 << params.coeff_modulus_bits) - params.coeff_modulus
    rounded = (params.plain_modulus // 2 - m * gap) >> params.plain_modulus_bits
    rounded += m << (params.coeff_modulus_bits - params.plain_modulus_bits)
    return rounded.view(np.uint64)


def unscale(phase: Coefficients, params: ParameterSet) -> Coefficients:
    """round(t * x / q) mod t, half up, for uint64[n] of x in [0, q): the plaintext under a scaled one with noise.

    With x = u * 2^(b - p) + r and q = 2^b - g, t * x = u * q + (g * u + r * t), so the result is u plus a few units;
    g * u < 2^62, r * t and q / 2 are below 2^60 each, so uint64 holds them.
    """
    shift = np.uint64(params.coeff_modulus_bits - params.plain_modulus_bits)
    gap = np.uint64((1 << params.coeff_modulus_bits) - params.coeff_modulus)
    quotient = phase >> shift
    rest = (phase & ((np.uint64(1) << shift) - np.uint64(1))) << np.uint64(params.plain_modulus_bits)
    rest += quotient * gap + np.uint64(params.coeff_modulus // 2)
    quotient += rest // np.uint64(params.coeff_modulus)
    return quotient & np.uint64(params.plain_modulus - 1)


def reduce(values: Coefficients, params: ParameterSet) -> Coefficients:
    """Any uint64[n] mod q. With q = 2^b - g, the bits from b on count g each; what is left is below 2 * q."""
    bits = np.uint64(params.coeff_modulus_bits)
    gap = np.uint64((1 << params.coeff_modulus_bits) - params.coeff_modulus)
    low = values & np.uint64((1 << params.coeff_modulus_bits) - 1)
    low += (values >> bits) * gap
    # Below q the subtraction wraps to a huge number, and the smaller one is right in both cases.
    return np.minimum(low, low - np.uint64(params.coeff_modulus))


def lazy_terms(params: ParameterSet) -> int:
    """How many reduced coefficients may be added up in uint64 before `reduce`."""
    return ((1 << _WORD_BITS) - 1) // (params.coeff_modulus - 1)


def subtract(values: Coefficients, taken: Coefficients, params: ParameterSet) -> Coefficients:
    """values - taken mod q, both reduced."""
    return reduce(values + (np.uint64(params.coeff_modulus) - taken), params)
