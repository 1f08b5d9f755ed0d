"""What a holder of the group key reads in an upload beside its plaintext: the noise.

A masked upload of m decrypts to y = m + mask mod t, which is uniform. Its phase, c0 + c1 * s, is round(q * y / t) plus
the encryption's noise when values and mask were scaled together; when they were scaled one by one, it also has the
difference of the roundings, which is a function of m and y. The coalition knows y and the distribution of the noise
(centred binomial, 21 pairs of coins), so that it can weigh two candidates for m against each other.
"""

from math import comb, log
from typing import Final

import numpy as np
import numpy.typing as npt

from services.secure_sum import encoding, public, ring, secret, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout

Integers = npt.NDArray[np.int64]

_HALF: Final = DEFAULT.coeff_modulus // (2 * DEFAULT.plain_modulus)
_LIKELY: Final = np.array([log(comb(42, 21 + e) / 2**42) if abs(e) <= 21 else -99.0 for e in range(-30, 31)])


def read(layout: Layout, group_key: bytes, upload: bytes) -> tuple[Coefficients, Integers]:
    """y, uint64[count], and the noise phase - round(q * y / t), int64[count], of an upload of one segment.

    By decrypting alone: the noise is how far a coefficient is from being rounded up, found by bisection.
    """
    count = layout.coefficients(0)[1]
    c0, c1 = wire.split_sum(layout, 0, public.sum_segment(layout, 0, [upload], np.zeros(count, dtype=np.uint64)))
    rest = wire.pack(c1.reshape(-1))

    def decrypted(first: Coefficients) -> Coefficients:
        values = secret.decrypt_segments([wire.join(first, rest)], group_key, layout)
        return encoding.encode(values, DEFAULT, layout.lanes).reshape(-1)[:count]

    y = decrypted(c0)
    bare = ring.subtract(c0, ring.scale(y, DEFAULT), DEFAULT)
    low, high = (np.full(count, _HALF + side, dtype=np.int64) for side in (-32, 32))
    while (high - low > 1).any():
        middle = (low + high) // 2
        stays = decrypted(ring.reduce(bare + middle.astype(np.uint64), DEFAULT)) == 0
        low, high = np.where(stays, middle, low), np.where(stays, high, middle)
    return y, _HALF - low


def weigh(noise: Integers, y: Coefficients, candidate: Int64Vector, layout: Layout) -> float:
    """Log-likelihood of a candidate, were values and mask scaled one by one."""
    m = encoding.encode(candidate, DEFAULT, layout.lanes).reshape(-1)[: y.size]
    mask = (y - m) & np.uint64(DEFAULT.plain_modulus - 1)
    both = ring.reduce(ring.scale(m, DEFAULT) + ring.scale(mask, DEFAULT), DEFAULT)
    trace = ring.subtract(both, ring.scale(y, DEFAULT), DEFAULT).astype(object)
    centred = np.array([int(v) - DEFAULT.coeff_modulus if v > DEFAULT.coeff_modulus // 2 else int(v) for v in trace])
    return float(_LIKELY[np.clip(noise - centred + 30, 0, 60)].sum())
