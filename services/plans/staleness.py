"""Staleness weights of asynchronous rounds: 1 / sqrt(1 + age), in exact integers.

The age of a contribution is the number of versions that were made since the one it was trained on. It is public: every
hospital signs it in its advert, so the weight that follows from it says nothing about data.
"""

import math
from typing import Final

WEIGHT_UNITS: Final = 64
"""The integer that stands for a weight of 1."""
MAX_AGE: Final = 100
"""The largest bound on the age that a plan may set; the weight is 6 / 64 there."""


def weight_units(age: int) -> int:
    """floor(64 / sqrt(1 + age)): 64 for a fresh contribution, and never more. Never 0 up to `MAX_AGE`.

    The square root of a floor is exact in integers: floor(sqrt(x)) = isqrt(floor(x)).
    """
    return math.isqrt(WEIGHT_UNITS * WEIGHT_UNITS // (1 + age))
