"""Mask streams over Z_t: ChaCha20 (RFC 8439) under a derived key with a zero nonce, 8 bytes a coefficient.

A key serves one attempt and one purpose (see `derive`), so that a zero nonce never repeats under it. t, the plaintext
modulus of the sum's parameter set, is a power of two and divides 2^64: streams are added as they come, mod 2^64, and
reduced once.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from services.common.errors import Code, FedmeshError
from services.secure_sum.derive import MaskPlan, mask_key_pair, pair_key, seed_commitment, self_key
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout

__all__ = ["MaskPlan", "coefficients", "mask_key_pair", "of_segment", "pair_key", "seed_commitment", "self_key"]

_COEFFICIENT_BYTES: Final = 8
_BLOCK_BYTES: Final = 64
_PIECE: Final = 1 << 15
"""Coefficients made at a time: 256 KiB, which stays in the processor's cache."""
_MAX_COEFFICIENTS: Final = (1 << 32) * _BLOCK_BYTES // _COEFFICIENT_BYTES
"""As far as ChaCha20's 32-bit block counter reaches."""


def coefficients(
    plan: MaskPlan, start: int, count: int, modulus_bits: int = DEFAULT.plain_modulus_bits
) -> npt.NDArray[np.uint64]:
    """Coefficients [start, start + count) of a mask, uint64[count] below 2^modulus_bits.

    `start` is a multiple of 8, one ChaCha20 block; segments start at multiples of 65,536.

    Raises: FedmeshError(INVALID_ARGUMENT) for another start, or a range that the generator does not reach.
    """
    if start < 0 or count < 0 or start * _COEFFICIENT_BYTES % _BLOCK_BYTES or start + count > _MAX_COEFFICIENTS:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a mask has no coefficients {start} to {start + count}")
    total = np.zeros(count, dtype=np.uint64)
    streams = [(_stream(key, start), sign) for key, sign in plan]
    zeros = bytes(_PIECE * _COEFFICIENT_BYTES)
    piece = np.empty(_PIECE, dtype="<u8")
    for begin in range(0, count, _PIECE):
        part = total[begin : begin + _PIECE]
        source, target = memoryview(zeros)[: part.nbytes], piece[: part.size]
        for stream, sign in streams:
            stream.update_into(source, target.data.cast("B"))
            if sign > 0:
                part += target
            else:
                part -= target
    total &= np.uint64((1 << modulus_bits) - 1)
    return total


def of_segment(plan: MaskPlan, layout: Layout, index: int) -> npt.NDArray[np.uint64]:
    """The coefficients of a mask that segment `index` of a layout takes.

    Raises: FedmeshError(INVALID_ARGUMENT) if there is no such segment.
    """
    start, count = layout.coefficients(index)
    return coefficients(plan, start, count, layout.params.plain_modulus_bits)


def _stream(key: bytes, start: int) -> CipherContext:
    block = start * _COEFFICIENT_BYTES // _BLOCK_BYTES
    # The algorithm's "nonce" is the block counter, 4 bytes little-endian, and the nonce of 12 bytes.
    return Cipher(ChaCha20(key, block.to_bytes(4, "little") + bytes(12)), mode=None).encryptor()
