"""The integers that benchmark hospitals sum: they follow from a seed, so that the sum can be checked independently."""

from typing import Final

import numpy as np
import numpy.typing as npt

from services.secure_sum.encoding import lane_bits
from services.secure_sum.parameters import DEFAULT, ParameterSet

# Bits of a value, sign included, that leave room for the sum of sixteen hospitals in a lane of the default set.
VALUE_BITS: Final = {1: 40, 2: 20}


# Bits that a staleness weight takes of a value.
WEIGHT_BITS: Final = 8


def spare_bits(params: ParameterSet, lanes: int) -> int:
    """By how many bits the lanes of a set are narrower than those of the default one: `spare` of its vectors."""
    return lane_bits(DEFAULT, lanes) - lane_bits(params, lanes)


def vector(
    seed: int, hospital: int, round_number: int, length: int, lanes: int, spare: int = 0
) -> npt.NDArray[np.int64]:
    """One hospital's contribution in one round: int64[length], uniform over the signed range of `VALUE_BITS`, less the
    `spare` ones.
    """
    half = 1 << (VALUE_BITS[lanes] - spare - 1)
    values = np.random.default_rng((seed, hospital, round_number)).integers(-half, half, length, dtype=np.int64)
    # The extremes must survive too.
    values[0], values[-1] = -half, half - 1
    return values
