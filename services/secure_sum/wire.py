"""The layout of uploads and sums, checked completely before any homomorphic-encryption code sees a byte.

A vector is a sequence of *segments* of 16 ciphertexts; the last may be shorter. A segment is what is hashed, sent,
stored, added and checked, always alone, so that nobody needs memory for more than a few of them. It has no header: the
form (parameter set, lanes, vector length) stands in signed statements and decides every length.

    upload segment   c0 | one 32-byte seed of c1 a ciphertext          at most 492,032 bytes, 3.75 a value
    sum segment      c0 | c1, all N coefficients of each ciphertext    at most 983,040 bytes, 7.5 a value

Under a set with a public key no seed makes c1: there a segment of an upload has the form of one of a sum.

c0 holds only the coefficients that carry values, through all ciphertexts (rounded up to an even number): decryption
works coefficient by coefficient, m[i] = c0[i] + (c1*s)[i], so the rest of the last c0 is not needed by anyone, and a
small model pays for its own size only. Coefficients have 60 bits and are packed two to 15 bytes, little-endian: there
are no spare bits, so every segment has exactly one encoding. Nothing of SEAL's own serialisation (lengths,
compression, hashes, flags) travels: the receiver writes those fields itself, so a sender controls only coefficients,
each checked to be below q, and seeds, of which every value is valid.
"""

from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.secure_sum.encoding import Coefficients, ciphertext_count
from services.secure_sum.parameters import ParameterSet, parameter_set
from services.secure_sum.uniform import SEED_BYTES

Bytes = npt.NDArray[np.uint8]

SEGMENT_CIPHERTEXTS: Final = 16
_PAIR_BYTES: Final = 15
_LOW_60: Final = np.uint64((1 << 60) - 1)


@dataclass(frozen=True)
class Layout:
    """Where everything is in the segments of one form. Made by `layout_of`.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad length or lane count.
    """

    params: ParameterSet
    vector_length: int
    lanes: int

    def __post_init__(self) -> None:
        ciphertext_count(self.params, self.vector_length, self.lanes)

    @property
    def ciphertexts(self) -> int:
        """Ciphertexts of the whole vector."""
        return ciphertext_count(self.params, self.vector_length, self.lanes)

    @property
    def segments(self) -> int:
        """Segments of the whole vector."""
        return -(-self.ciphertexts // SEGMENT_CIPHERTEXTS)

    @property
    def upload_bytes(self) -> int:
        """Bytes of an upload, all segments together."""
        if self.params.public_key:
            return self.sum_bytes
        return packed_size(self._c0_coefficients) + self.ciphertexts * SEED_BYTES

    @property
    def sum_bytes(self) -> int:
        """Bytes of a sum, all segments together."""
        return packed_size(self._c0_coefficients + self.ciphertexts * self.params.poly_modulus_degree)

    @property
    def _c0_coefficients(self) -> int:
        used = -(-self.vector_length // self.lanes)
        return used + used % 2

    @property
    def _segment_coefficients(self) -> int:
        return SEGMENT_CIPHERTEXTS * self.params.poly_modulus_degree

    def ciphertexts_of(self, index: int) -> int:
        """Ciphertexts of segment `index`: 16, or fewer in the last.

        Raises:
            FedmeshError: INVALID_ARGUMENT if there is no such segment.
        """
        if not 0 <= index < self.segments:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"there are segments 0 to {self.segments - 1}, not {index}", field="index"
            )
        return min(SEGMENT_CIPHERTEXTS, self.ciphertexts - index * SEGMENT_CIPHERTEXTS)

    def coefficients(self, index: int) -> tuple[int, int]:
        """(start, count) of the c0 coefficients that travel in segment `index`, counted through the whole vector.

        Raises:
            FedmeshError: INVALID_ARGUMENT if there is no such segment.
        """
        self.ciphertexts_of(index)
        start = index * self._segment_coefficients
        return start, min(self._segment_coefficients, self._c0_coefficients - start)

    def values(self, index: int) -> tuple[int, int]:
        """(start, count) of the values of the vector that segment `index` holds.

        Raises:
            FedmeshError: INVALID_ARGUMENT if there is no such segment.
        """
        start = self.coefficients(index)[0] * self.lanes
        return start, min(self._segment_coefficients * self.lanes, self.vector_length - start)

    def upload_segment_bytes(self, index: int) -> int:
        """Exact length of segment `index` of an upload.

        Raises:
            FedmeshError: INVALID_ARGUMENT if there is no such segment.
        """
        if self.params.public_key:
            return self.sum_segment_bytes(index)
        return packed_size(self.coefficients(index)[1]) + self.ciphertexts_of(index) * SEED_BYTES

    def sum_segment_bytes(self, index: int) -> int:
        """Exact length of segment `index` of a sum.

        Raises:
            FedmeshError: INVALID_ARGUMENT if there is no such segment.
        """
        c1 = self.ciphertexts_of(index) * self.params.poly_modulus_degree
        return packed_size(self.coefficients(index)[1] + c1)


def layout_of(parameter_set_name: str, vector_length: int, lanes: int) -> Layout:
    """The layout of a form.

    Raises:
        FedmeshError: INVALID_ARGUMENT for an unknown parameter set, a bad length or lane count.
    """
    return Layout(parameter_set(parameter_set_name), vector_length, lanes)


def packed_size(coefficients: int) -> int:
    """Bytes of an even number of packed coefficients."""
    return coefficients // 2 * _PAIR_BYTES


def split_upload(layout: Layout, index: int, segment: bytes) -> tuple[Coefficients, Bytes]:
    """c0, uint64[count], each below q, and what follows it in a segment of an upload.

    That is the seeds, uint8[ciphertexts, 32], or under a public key c1, packed, each coefficient below q.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID for a wrong length or a coefficient that is not below q; INVALID_ARGUMENT if
            there is no such segment.
    """
    c0, rest = _split(layout, index, segment, layout.upload_segment_bytes(index))
    if layout.params.public_key:
        unpack(rest, layout.params)
        return c0, rest
    return c0, rest.reshape(-1, SEED_BYTES)


def split_sum(layout: Layout, index: int, segment: bytes) -> tuple[Coefficients, Coefficients]:
    """c0, uint64[count], and c1, uint64[ciphertexts, N], of a segment of a sum; all below q.

    Raises:
        FedmeshError: as `split_upload`.
    """
    c0, rest = _split(layout, index, segment, layout.sum_segment_bytes(index))
    return c0, unpack(rest, layout.params).reshape(-1, layout.params.poly_modulus_degree)


def _split(layout: Layout, index: int, segment: bytes, expected: int) -> tuple[Coefficients, Bytes]:
    if len(segment) != expected:
        _invalid(f"segment {index} has {len(segment)} bytes, expected {expected}")
    body = np.frombuffer(segment, dtype=np.uint8)
    end = packed_size(layout.coefficients(index)[1])
    return unpack(body[:end], layout.params), body[end:]


def join(c0: Coefficients, rest: Bytes) -> bytes:
    """A segment of c0, uint64[count], and the bytes that follow it."""
    return b"".join((pack(c0).data, rest.data))


def pack(coefficients: Coefficients) -> Bytes:
    """Pack uint64[n], n even, entries below 2^60, into uint8[7.5 n]."""
    even, odd = coefficients[0::2], coefficients[1::2]
    packed = np.empty(even.size * _PAIR_BYTES, dtype=np.uint8)
    # Byte 7 belongs to both words, and both write the same into it.
    _words(packed, 0)[...] = even | (odd << np.uint64(60))
    _words(packed, 7)[...] = (odd << np.uint64(4)) | (even >> np.uint64(56))
    return packed


def unpack(packed: Bytes, params: ParameterSet) -> Coefficients:
    """Unpack uint8[7.5 n] into uint64[n]; every entry is checked to be below q.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if a coefficient is not below q.
    """
    coefficients = np.empty(packed.size // _PAIR_BYTES * 2, dtype=np.uint64)
    np.bitwise_and(_words(packed, 0), _LOW_60, out=coefficients[0::2])
    np.right_shift(_words(packed, 7), np.uint64(4), out=coefficients[1::2])
    if coefficients.size and coefficients.max() >= params.coeff_modulus:
        _invalid("a coefficient is not below the ciphertext modulus")
    return coefficients


def _words(packed: Bytes, offset: int) -> Coefficients:
    """A view of the 8 bytes at `offset` of every pair."""
    pairs = packed.size // _PAIR_BYTES
    return np.ndarray((pairs,), "<u8", buffer=packed.data, offset=offset, strides=(_PAIR_BYTES,)) if pairs else _EMPTY


_EMPTY: Final = np.empty(0, dtype=np.uint64)


def _invalid(why: str) -> NoReturn:
    raise FedmeshError(Code.CIPHERTEXT_INVALID, f"the ciphertext was rejected: {why}")
