"""How a simulated hospital turns integers into something that can be added blindly.

`Plain` leaves the encryption out: a vector is 8-byte words mod 2^48, so that thousands of attempts take seconds and an
attacker who holds the group key has nothing left to decrypt. `services.secure_sum`'s masks are used as they are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np

from services.secure_sum import masks
from services.secure_sum.masks import MaskPlan
from services.secure_sum.parameters import DEFAULT

Integers = tuple[int, ...]
Segments = tuple[bytes, ...]

RING_BITS: Final = 48
RING: Final = 1 << RING_BITS


def centred(value: int) -> int:
    """The representative of `value` mod 2^48 in [-2^47, 2^47)."""
    return (value + RING // 2) % RING - RING // 2


def add(vectors: Sequence[Integers]) -> Integers:
    """The sum in plain Python integers: what every accepted sum is compared with."""
    return tuple(sum(column) for column in zip(*vectors, strict=True))


def sha256(segments: Segments) -> str:
    """What an `upload` statement calls `ciphertext_sha256`."""
    return hashlib.sha256(b"".join(segments)).hexdigest()


def segment_hashes(segments: Segments) -> list[str]:
    return [hashlib.sha256(segment).hexdigest() for segment in segments]


class Arithmetic(Protocol):
    """The blind addition, as hospitals and aggregator use it."""

    length: int
    lanes: int
    parameter_set: str

    def prepare(self) -> Segments:
        """Whatever a hospital makes before the group is known."""
        ...

    def protect(self, prepared: Segments, values: Integers, plan: MaskPlan) -> Segments:
        """The upload: `values` under the masks of `plan`."""
        ...

    def total(self, uploads: Sequence[Segments], correction: MaskPlan) -> Segments:
        """The sum of the uploads without the masks of `correction`; needs no key."""
        ...

    def open(self, total: Segments) -> Integers:
        """The integers in a sum."""
        ...


class Plain:
    """Words mod 2^48 in the clear."""

    lanes = 1
    parameter_set = DEFAULT.name

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def prepare(self) -> Segments:
        return ()

    def protect(self, prepared: Segments, values: Integers, plan: MaskPlan) -> Segments:
        return (self._words(values, plan, 1),)

    def total(self, uploads: Sequence[Segments], correction: MaskPlan) -> Segments:
        columns = add([self.open(upload) for upload in uploads])
        return (self._words(columns, correction, -1),)

    def open(self, total: Segments) -> Integers:
        words = np.frombuffer(total[0], dtype="<u8")
        return tuple(centred(int(word)) for word in words)

    def expand(self, plan: MaskPlan) -> Integers:
        """The masks of a plan, as integers mod 2^48."""
        return tuple(int(word) for word in masks.coefficients(plan, 0, self.length))

    def _words(self, values: Integers, plan: MaskPlan, sign: int) -> bytes:
        masked = [(v + sign * m) % RING for v, m in zip(values, self.expand(plan), strict=True)]
        return np.array(masked, dtype="<u8").tobytes()


def disclosed(uploads: Mapping[str, Segments], plain: Plain) -> dict[str, Integers]:
    """What a holder of the group key reads in uploads."""
    return {hospital: plain.open(upload) for hospital, upload in uploads.items()}
