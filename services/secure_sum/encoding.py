"""Signed integers <-> plaintext coefficients.

A coefficient is an integer mod t = 2^p and holds one value (`lanes` = 1: signed, p bits) or two (`lanes` = 2: signed,
p/2 bits each, `lo + 2^(p/2) * hi` mod 2^p); p is 48, or 44 where a public key encrypts. Coefficients add mod t when
ciphertexts add; a lane decodes to the exact sum as long as that sum lies in the lane's signed range. A sum that leaves
it corrupts that value and its neighbour: it costs utility, never privacy.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.secure_sum.parameters import ParameterSet

Int64Vector = npt.NDArray[np.int64]
Coefficients = npt.NDArray[np.uint64]

LANES: Final = (1, 2)

OVERFLOW_PROBABILITY: Final = 2.0**-40
"""Chance that a noised sum leaves its lanes anywhere in the vector, which `choose_lanes` accepts."""


def lane_bits(params: ParameterSet, lanes: int) -> int:
    """Width of one signed lane in bits.

    Raises:
        FedmeshError: INVALID_ARGUMENT if `lanes` is neither 1 nor 2.
    """
    if lanes not in LANES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"lanes must be 1 or 2, got {lanes}", lanes=lanes)
    return params.plain_modulus_bits // lanes


def contribution_limit(params: ParameterSet, lanes: int, hospitals: int) -> int:
    """Largest |value| that each of `hospitals` may send so that their sum cannot leave its lane.

    Raises:
        FedmeshError: INVALID_ARGUMENT if `lanes` is unknown or `hospitals` is outside 1..max_contributions.
    """
    if not 1 <= hospitals <= params.max_contributions:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"{params.name} sums 1 to {params.max_contributions} hospitals, got {hospitals}: "
            "a larger cohort needs another parameter set",
            hospitals=hospitals,
        )
    return ((1 << (lane_bits(params, lanes) - 1)) - 1) // hospitals


def fits(values: Int64Vector, params: ParameterSet, lanes: int, hospitals: int) -> bool:
    """Whether every |value| is within `contribution_limit`; `values` is int64[n].

    Raises:
        FedmeshError: as `contribution_limit`.
    """
    limit = contribution_limit(params, lanes, hospitals)
    return values.size == 0 or bool(values.max() <= limit and values.min() >= -limit)


def require_fits(values: Int64Vector, params: ParameterSet, lanes: int, hospitals: int) -> None:
    """Refuse a vector whose sum over `hospitals` such vectors could overflow.

    Raises:
        FedmeshError: INVALID_ARGUMENT naming the limit; or as `contribution_limit`.
    """
    if not fits(values, params, lanes, hospitals):
        limit = contribution_limit(params, lanes, hospitals)
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"a contribution has a value beyond +-{limit}, the limit for {hospitals} hospitals with {lanes} lane(s): "
            "lower the plan's integer scale or use one lane",
            limit=limit,
            lanes=lanes,
            hospitals=hospitals,
        )


def choose_lanes(
    params: ParameterSet, contribution_bound: int, hospitals: int, share_sigma: float, vector_length: int
) -> int:
    """Return the most lanes (fewest bytes) for which the noised sum overflows with probability <= 2^-40.

    The sum of the clipped parts is at most `hospitals * contribution_bound` in absolute value. The noise of all
    hospitals is subgaussian with variance proxy hospitals * share_sigma^2 (a discrete Gaussian is subgaussian with its
    own sigma: Canonne, Kamath and Steinke 2020, section 3), so a union bound over `vector_length` values needs
    z = sqrt(2 ln(2 * vector_length / 2^-40)) standard deviations of room.

    Args:
        contribution_bound: largest |value| of one hospital before noise, integer units.
        share_sigma: sigma of one hospital's noise share, integer units; 0 without privacy.

    Raises:
        FedmeshError: INVALID_ARGUMENT if even one lane is too narrow.
    """
    z = math.sqrt(2 * math.log(2 * max(vector_length, 1) / OVERFLOW_PROBABILITY))
    needed = hospitals * contribution_bound + z * share_sigma * math.sqrt(hospitals)
    for lanes in sorted(LANES, reverse=True):
        if needed <= (1 << (lane_bits(params, lanes) - 1)) - 1:
            return lanes
    raise FedmeshError(
        Code.INVALID_ARGUMENT,
        f"sums of up to {needed:.3g} do not fit {params.plain_modulus_bits}-bit lanes: lower the integer scale",
    )


def ciphertext_count(params: ParameterSet, vector_length: int, lanes: int) -> int:
    """Number of ciphertexts that hold `vector_length` values.

    Raises:
        FedmeshError: INVALID_ARGUMENT if `lanes` is unknown or the length is outside 1..max_vector_length.
    """
    lane_bits(params, lanes)
    if not 1 <= vector_length <= params.max_vector_length:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"a vector has 1 to {params.max_vector_length} values, got {vector_length}",
            vector_length=vector_length,
        )
    return -(-vector_length // (params.poly_modulus_degree * lanes))


def encode(values: Int64Vector, params: ParameterSet, lanes: int) -> Coefficients:
    """Pack int64[n] into uint64[ciphertexts, N], each coefficient in [0, t); unused places are zero.

    Value i goes to lane i % lanes of coefficient i // lanes.

    Raises:
        FedmeshError: INVALID_ARGUMENT if `values` is not one-dimensional int64, has a bad length, or holds a value
            outside the lane's signed range.
    """
    require_encodable(values, params, lanes)
    count = ciphertext_count(params, values.size, lanes)
    padded = np.zeros(count * params.poly_modulus_degree * lanes, dtype=np.int64)
    padded[: values.size] = values
    packed = padded if lanes == 1 else padded[0::2] + (padded[1::2] << lane_bits(params, lanes))
    coefficients = packed.view(np.uint64) & np.uint64(params.plain_modulus - 1)
    return coefficients.reshape(count, params.poly_modulus_degree)


def require_encodable(values: Int64Vector, params: ParameterSet, lanes: int) -> None:
    """Refuse what `encode` cannot encode.

    Raises:
        FedmeshError: INVALID_ARGUMENT, as `encode`.
    """
    if values.ndim != 1 or values.dtype != np.int64:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"values must be int64[n], got {values.dtype}{list(values.shape)}")
    ciphertext_count(params, values.size, lanes)
    half = 1 << (lane_bits(params, lanes) - 1)
    if values.min() < -half or values.max() >= half:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"a value lies outside the signed {lane_bits(params, lanes)}-bit lane", lanes=lanes
        )


def decode(coefficients: Coefficients, params: ParameterSet, lanes: int, vector_length: int) -> Int64Vector:
    """Inverse of `encode`: uint64[ciphertexts, N] with entries in [0, t) to int64[vector_length].

    Raises:
        FedmeshError: INVALID_ARGUMENT if the shape does not match the length.
    """
    count = ciphertext_count(params, vector_length, lanes)
    if coefficients.shape != (count, params.poly_modulus_degree):
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"expected coefficients of shape {(count, params.poly_modulus_degree)}, got {coefficients.shape}",
        )
    signed = _signed(coefficients.reshape(-1).view(np.int64), params.plain_modulus_bits)
    if lanes == 1:
        return signed[:vector_length].copy()
    bits = lane_bits(params, lanes)
    values = np.empty(signed.size * 2, dtype=np.int64)
    low = _signed(signed, bits)
    values[0::2] = low
    values[1::2] = _signed((signed - low) >> bits, bits)
    return values[:vector_length].copy()


def _signed(values: Int64Vector, bits: int) -> Int64Vector:
    """The representative mod 2^bits in [-2^(bits-1), 2^(bits-1))."""
    shift = 64 - bits
    return (values << shift) >> shift
