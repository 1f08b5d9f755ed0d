"""The fixed layout of an upload and of a sum, checked completely before any homomorphic-encryption code sees a byte.

All integers are little-endian. A blob is a 64-byte header, the c0 part, and the c1 part:

    offset  size  field
         0     4  magic: "FMSU" an upload, "FMSS" a sum
         4     2  layout version, 1
         6     1  lanes, 1 or 2
         7     1  zero
         8    32  parameter set name, ASCII, padded with NUL
        40     8  vector length, values
        48     4  ciphertext count
        52     4  c0 coefficients
        56     4  contributions summed; 1 in an upload
        60     4  zero

c0 holds only the coefficients that carry values, through all ciphertexts (rounded up to an even number): decryption
works coefficient by coefficient, m[i] = c0[i] + (c1*s)[i], so the rest of the last c0 is not needed by anyone, and a
small model pays for its own size only. c1 is one 64-byte seed a ciphertext in an upload, and all N coefficients a
ciphertext in a sum. Coefficients have 60 bits and are packed two to 15 bytes: there are no spare bits, so every blob
has exactly one encoding. Nothing of SEAL's own serialisation (lengths, compression, hashes, flags) travels: the
receiver writes those fields itself, so a sender controls only coefficients, each checked to be below q, and seeds, of
which every value is valid.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.secure_sum.encoding import Coefficients, ciphertext_count
from services.secure_sum.parameters import ParameterSet

LAYOUT_VERSION: Final = 1
SEED_BYTES: Final = 64
HEADER_BYTES: Final = 64
_PAIR_BYTES: Final = 15
_HEADER: Final = struct.Struct("<4sHBB32sQIIII")


class Kind(Enum):
    """What a blob is; the value is its magic."""

    UPLOAD = b"FMSU"
    SUM = b"FMSS"

    @property
    def described(self) -> str:
        return "an upload" if self is Kind.UPLOAD else "a sum"


@dataclass(frozen=True)
class Blob:
    """A parsed upload or sum. Arrays are read-only views of the bytes; `unpack` checks the coefficients in them."""

    kind: Kind
    count: int
    """Ciphertexts."""
    contributions: int
    c0: npt.NDArray[np.uint8]
    """uint8[7.5 * coefficients], packed."""
    c1: npt.NDArray[np.uint8]
    """uint8[count, 64], seeds, in an upload; uint8[count, 7.5 N], packed, in a sum."""


def polynomial_size(params: ParameterSet) -> int:
    """Bytes of one packed polynomial with all its N coefficients."""
    return _packed_size(params.poly_modulus_degree)


def _packed_size(coefficients: int) -> int:
    return coefficients // 2 * _PAIR_BYTES


def c0_coefficients(vector_length: int, lanes: int) -> int:
    """Number of c0 coefficients that travel: one for each group of `lanes` values, rounded up to even."""
    used = -(-vector_length // lanes)
    return used + used % 2


def _c1_size(kind: Kind, params: ParameterSet) -> int:
    return SEED_BYTES if kind is Kind.UPLOAD else polynomial_size(params)


def _size(kind: Kind, params: ParameterSet, vector_length: int, lanes: int) -> int:
    c1 = ciphertext_count(params, vector_length, lanes) * _c1_size(kind, params)
    return HEADER_BYTES + _packed_size(c0_coefficients(vector_length, lanes)) + c1


def upload_size(params: ParameterSet, vector_length: int, lanes: int = 2) -> int:
    """Exact length of an upload in bytes: 3.79 a value with two lanes and many values.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad length or lane count.
    """
    return _size(Kind.UPLOAD, params, vector_length, lanes)


def sum_size(params: ParameterSet, vector_length: int, lanes: int = 2) -> int:
    """Exact length of a sum in bytes: 7.56 a value with two lanes and many values.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad length or lane count.
    """
    return _size(Kind.SUM, params, vector_length, lanes)


def write(
    kind: Kind,
    params: ParameterSet,
    vector_length: int,
    lanes: int,
    contributions: int,
    c0: Coefficients,
    c1: npt.NDArray[np.uint8],
) -> bytes:
    """Serialise c0, uint64[count, N], of which only the used coefficients are written, and c1 as in `Blob`."""
    used = c0_coefficients(vector_length, lanes)
    header = _HEADER.pack(
        kind.value,
        LAYOUT_VERSION,
        lanes,
        0,
        params.name.encode("ascii"),
        vector_length,
        len(c1),
        used,
        contributions,
        0,
    )
    return header + pack(c0.reshape(-1)[:used]).tobytes() + c1.tobytes()


def parse(blob: bytes, kind: Kind, params: ParameterSet, vector_length: int, lanes: int = 2) -> Blob:
    """Check header and length and split a blob into its parts.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if any field differs from what was expected, or the blob is too short or too
            long; INVALID_ARGUMENT if the expectation itself is out of range.
    """
    count = ciphertext_count(params, vector_length, lanes)
    used = c0_coefficients(vector_length, lanes)
    if len(blob) < HEADER_BYTES:
        _invalid(f"it has {len(blob)} bytes, less than a header")
    fields = _HEADER.unpack_from(blob)
    magic, version, got_lanes, zero, name, got_vector, got_count, got_used, contributions, zero_end = fields
    if magic != kind.value:
        _invalid(f"it is not {kind.described} (magic {magic.hex()})")
    if version != LAYOUT_VERSION:
        _invalid(f"layout version {version} is unknown, this build reads {LAYOUT_VERSION}")
    _check_name(name, params)
    _expect("lanes", got_lanes, lanes)
    _expect("vector length", got_vector, vector_length)
    _expect("ciphertext count", got_count, count)
    _expect("number of c0 coefficients", got_used, used)
    _expect("reserved field", zero, 0)
    _expect("reserved field", zero_end, 0)
    most = 1 if kind is Kind.UPLOAD else params.max_contributions
    if not 1 <= contributions <= most:
        _invalid(f"it claims {contributions} contributions, 1 to {most} are possible")
    _expect("length in bytes", len(blob), _size(kind, params, vector_length, lanes))
    body = np.frombuffer(blob, dtype=np.uint8, offset=HEADER_BYTES)
    split = _packed_size(used)
    return Blob(kind, count, contributions, body[:split], body[split:].reshape(count, _c1_size(kind, params)))


def _expect(what: str, got: int, expected: int) -> None:
    if got != expected:
        _invalid(f"its {what} is {got}, expected {expected}")


def _check_name(name: bytes, params: ParameterSet) -> None:
    if name != params.name.encode("ascii").ljust(32, b"\0"):
        shown = name.rstrip(b"\0").decode("ascii", "replace")
        _invalid(f"it was made under parameter set {shown!r}, this sum uses {params.name!r}")


def pack(coefficients: Coefficients) -> npt.NDArray[np.uint8]:
    """Pack uint64[n], n even, entries below 2^60, into uint8[7.5 n]."""
    even, odd = coefficients[0::2], coefficients[1::2]
    packed = np.empty((even.size, _PAIR_BYTES), dtype=np.uint8)
    packed[:, :8] = (even | (odd << np.uint64(60)))[:, None].view(np.uint8)
    packed[:, 8:] = (odd >> np.uint64(4))[:, None].view(np.uint8)[:, :7]
    return packed.reshape(-1)


def unpack(packed: npt.NDArray[np.uint8], params: ParameterSet, count: int) -> Coefficients:
    """Unpack uint8[7.5 n] into uint64[count, N], zero after the first n; every entry is checked to be below q.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if a coefficient is not below q.
    """
    pairs = packed.size // _PAIR_BYTES
    words = np.zeros((pairs, 16), dtype=np.uint8)
    words[:, :_PAIR_BYTES] = packed.reshape(pairs, _PAIR_BYTES)
    low, high = words.view(np.uint64).T
    coefficients = np.zeros(count * params.poly_modulus_degree, dtype=np.uint64)
    coefficients[0 : 2 * pairs : 2] = low & np.uint64((1 << 60) - 1)
    coefficients[1 : 2 * pairs : 2] = (low >> np.uint64(60)) | (high << np.uint64(4))
    if coefficients.max() >= params.coeff_modulus:
        _invalid("a coefficient is not below the ciphertext modulus")
    return coefficients.reshape(count, params.poly_modulus_degree)


def _invalid(why: str) -> NoReturn:
    raise FedmeshError(Code.CIPHERTEXT_INVALID, f"the ciphertext was rejected: {why}")
