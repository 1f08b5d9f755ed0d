"""How a simulated hospital turns integers into something that can be added blindly.

`Plain` leaves the encryption out: a vector is 8-byte words mod 2^48, so that thousands of attempts take seconds and an
attacker who holds the group key has nothing left to decrypt. `Encrypted` is the real BFV layer, keys of a key epoch
included. Both use the masks of `services.secure_sum` as they are.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from services.secure_sum import masks, public, secret
from services.secure_sum.encoding import Coefficients, contribution_limit
from services.secure_sum.encryption import Encryptor, PublicEncryptor
from services.secure_sum.epoch import EpochKeys
from services.secure_sum.masks import MaskPlan
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import layout_of

Integers = tuple[int, ...]
Segments = tuple[bytes, ...]

RING_BITS: Final = 48
RING: Final = 1 << RING_BITS
LARGEST: Final = 10**6
MOST_HOSPITALS: Final = 8


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
    largest: int
    """|value| of a hospital at most, so that no sum of `MOST_HOSPITALS` leaves its lane."""

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
    largest = LARGEST

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


class Encrypted:
    """BFV under the keys of a key epoch, which every member opened for itself."""

    def __init__(self, keys: EpochKeys, length: int, lanes: int, parameter_set: str = DEFAULT.name) -> None:
        self.length = length
        self.lanes = lanes
        self.parameter_set = parameter_set
        self.layout = layout_of(parameter_set, length, lanes)
        self.largest = min(LARGEST, contribution_limit(self.layout.params, lanes, MOST_HOSPITALS))
        self._group_key = keys.group_key
        self._encryptor: Encryptor = secret.SecretEncryptor(keys.group_key)
        if self.layout.params.public_key:
            self._encryptor = PublicEncryptor(keys.require_public_key())

    def prepare(self) -> Segments:
        return tuple(self._encryptor.zeros(self.layout))

    def protect(self, prepared: Segments, values: Integers, plan: MaskPlan) -> Segments:
        return tuple(self._masked(index, zeros, values, plan) for index, zeros in enumerate(prepared))

    def _masked(self, index: int, zeros: bytes, values: Integers, plan: MaskPlan) -> bytes:
        start, count = self.layout.values(index)
        part = np.array(values[start : start + count], dtype=np.int64)
        return public.add_masked(self.layout, index, zeros, part, self._mask(plan, index))

    def _mask(self, plan: MaskPlan, index: int) -> Coefficients:
        return masks.of_segment(plan, self.layout, index)

    def total(self, uploads: Sequence[Segments], correction: MaskPlan) -> Segments:
        return tuple(
            public.sum_segment(self.layout, index, of_segment, self._mask(correction, index))
            for index, of_segment in enumerate(zip(*uploads, strict=True))
        )

    def open(self, total: Segments) -> Integers:
        return tuple(int(v) for v in secret.decrypt_segments(total, self._group_key, self.layout))
