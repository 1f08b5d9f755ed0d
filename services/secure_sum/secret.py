"""The key side of the secure sum. Runs in hospitals only; the aggregator never imports this module.

One BFV secret key is shared by all hospitals of a cohort and by nobody else (the *group key*), whatever the parameter
set: sets with the same N and q share it. Under sets without a public key it encrypts too; for the others see
`encryption`. BFV is not secure against chosen ciphertexts: decrypt only a sum that a quorum of hospitals committed to,
never anything else.
"""

import hashlib
import hmac
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, public_key, ring, seal, uniform, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.parameters import DEFAULT, ParameterSet, parameter_set
from services.secure_sum.public_key import PublicKey
from services.secure_sum.uniform import SEED_BYTES
from services.secure_sum.wire import Layout

_Multiply = Callable[[Coefficients], Coefficients]

_KEY_HEADER: Final = struct.Struct("<4sHH32s")
_KEY_MAGIC: Final = b"FMGK"
_KEY_VERSION: Final = 1
_ERROR_MIDDLE: Final = 21
# Of the error of a public key: 24 standard deviations above the mean, 10.5 * N, of what honest makers draw.
_MOST_ERROR_SQUARED: Final = 16 * DEFAULT.poly_modulus_degree
_ERROR_BITS: Final = np.uint64((1 << 2 * _ERROR_MIDDLE) - 1)


def generate_group_key(params: ParameterSet = DEFAULT) -> bytes:
    """Make a BFV secret key from SEAL's generator, which is seeded by the operating system.

    Returns:
        A 40-byte header (magic "FMGK", version, zero, parameter set name) and the key's N coefficients in NTT form,
        packed like a ciphertext's. Keep it secret and only inside hospitals.
    """
    # The bindings' `data()` points into the key without keeping it alive: both names must outlive the read, or it
    # returns memory that belongs to somebody else by then, such as the key before.
    secret_key = sealapi.KeyGenerator(seal.context(params)).secret_key()
    key = secret_key.data()
    coefficients = seal.elements(key.data, params.poly_modulus_degree)
    _require_sound(coefficients)
    name = params.name.encode("ascii")
    return _KEY_HEADER.pack(_KEY_MAGIC, _KEY_VERSION, 0, name) + wire.pack(coefficients).tobytes()


def make_public_key(group_key: bytes) -> PublicKey:
    """A public key that belongs to a group key; every call makes another one.

    Raises:
        FedmeshError: INVALID_ARGUMENT if this is not a group key, or a degenerate one.
    """
    (data,) = encrypt_zeros(group_key, public_key.FORM)
    return PublicKey.from_bytes(data)


def require_public_key(group_key: bytes, public: PublicKey) -> None:
    """Refuse a public key that does not belong to a group key, or with which sums could fail to decrypt.

    The noise bound of `ParameterSet` needs a ternary secret s and a small error e = b + a*s of the public key; both are
    looked at here, since their maker drew them.

    Raises:
        FedmeshError: INVALID_ARGUMENT if it does not fit.
    """
    params = group_key_parameters(group_key)
    b, a = public.polynomials()
    one = np.zeros_like(a)
    one[0] = 1
    with _multiplier(params, group_key) as times_key:
        product, key = times_key(np.stack((a, one)))
    errors, key = _centred(ring.reduce(b + product, params), params), _centred(key, params)
    small = np.abs(errors).max() <= _ERROR_MIDDLE and np.sum(errors * errors) <= _MOST_ERROR_SQUARED
    if not small or np.abs(key).max() > 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the public key does not belong to the group key, or is too noisy")


def _centred(values: Coefficients, params: ParameterSet) -> Int64Vector:
    """The representatives mod q in (-q/2, q/2) of uint64[n] below q."""
    signed = values.astype(np.int64)
    return np.where(signed > params.coeff_modulus // 2, signed - params.coeff_modulus, signed)


def require_sound_key(group_key: bytes) -> None:
    """Refuse a group key that hides nothing, such as zero: whoever made it, everybody could read what it encrypts.

    Raises:
        FedmeshError: INVALID_ARGUMENT if this is not a group key, or a degenerate one.
    """
    params = group_key_parameters(group_key)
    try:
        _require_sound(_key_coefficients(params, group_key))
    except FedmeshError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key is degenerate: it would hide nothing") from error


def _require_sound(coefficients: Coefficients) -> None:
    """A ternary polynomial in NTT form looks uniform mod a 60-bit prime: no value is zero, none occurs twice."""
    if np.count_nonzero(coefficients) < coefficients.size or np.unique(coefficients).size < coefficients.size:
        raise FedmeshError(Code.INTERNAL, "the key generator gave a degenerate key")


def _key_coefficients(params: ParameterSet, group_key: bytes) -> Coefficients:
    packed = np.frombuffer(group_key, dtype=np.uint8, offset=_KEY_HEADER.size)
    return wire.unpack(packed, params)


def group_key_parameters(group_key: bytes) -> ParameterSet:
    """The parameter set that a group key belongs to.

    Raises:
        FedmeshError: INVALID_ARGUMENT if this is not a group key that this build reads.
    """
    if len(group_key) < _KEY_HEADER.size:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key is truncated")
    magic, version, zero, name = _KEY_HEADER.unpack_from(group_key)
    if magic != _KEY_MAGIC or version != _KEY_VERSION or zero != 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "this is not a group key that this build reads")
    params = parameter_set(name.rstrip(b"\0").decode("ascii", "replace"))
    if len(group_key) != _KEY_HEADER.size + wire.packed_size(params.poly_modulus_degree):
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key has the wrong length")
    return params


def encrypt_segments(values: Int64Vector, group_key: bytes, layout: Layout) -> Iterator[bytes]:
    """Encrypt int64[vector_length] into the segments of an upload: fresh randomness from the operating system.

    Nothing is encrypted before its segment is asked for. Keep the segments, masked, and re-send them; encrypting again
    makes different bytes.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad key, a key of another parameter set, a wrong length or type, or a
            value outside its lane; all before the first segment.
    """
    _require_set(group_key, layout)
    if layout.params.public_key:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"under {layout.params.name} the public key encrypts")
    encoding.require_encodable(values, layout.params, layout.lanes)
    if values.size != layout.vector_length:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"expected {layout.vector_length} values, got {values.size}")
    return _encrypting(values, group_key, layout)


def encrypt_zeros(group_key: bytes, layout: Layout) -> Iterator[bytes]:
    """Ciphertexts of zero, segment by segment, for `public.add_masked`: made before anybody waits. Use each once.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad key or a key of another parameter set.
    """
    return encrypt_segments(np.zeros(layout.vector_length, dtype=np.int64), group_key, layout)


class SecretEncryptor:
    """An `encryption.Encryptor` of sets without a public key: it holds the group key."""

    def __init__(self, group_key: bytes) -> None:
        self._group_key = group_key

    def zeros(self, layout: Layout) -> Iterator[bytes]:
        return encrypt_zeros(self._group_key, layout)


def _encrypting(values: Int64Vector, group_key: bytes, layout: Layout) -> Iterator[bytes]:
    params = layout.params
    with _multiplier(params, group_key) as times_key:
        for index in range(layout.segments):
            start, count = layout.values(index)
            plain = encoding.encode(values[start : start + count], params, layout.lanes)
            seeds = np.frombuffer(os.urandom(len(plain) * SEED_BYTES), dtype=np.uint8).reshape(-1, SEED_BYTES)
            c1 = np.stack([uniform.expand(seed.tobytes(), params) for seed in seeds])
            c0 = ring.scale(plain, params) + _errors(plain.shape, params)
            c0 = ring.subtract(ring.reduce(c0, params), times_key(c1), params)
            used = c0.reshape(-1)[: layout.coefficients(index)[1]]
            yield wire.join(used, seeds)


def _errors(shape: tuple[int, ...], params: ParameterSet) -> Coefficients:
    """Errors of fresh ciphertexts, uint64 mod q: the sum of 42 fair bits less 21, distributed as SEAL's.

    That is a centred binomial distribution of standard deviation 3.24. The bits come from ChaCha20 under a key from the
    operating system, which is used once.
    """
    count = math.prod(shape)
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    bits = np.frombuffer(stream, dtype="<u8") & _ERROR_BITS
    # The sums of 2, 4 and 8 neighbouring bits, and then of all bytes: no step depends on what the bits are.
    sums = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555_5555_5555_5555))
    sums = (sums & np.uint64(0x3333_3333_3333_3333)) + ((sums >> np.uint64(2)) & np.uint64(0x3333_3333_3333_3333))
    sums = (sums + (sums >> np.uint64(4))) & np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    ones = (sums * np.uint64(0x0101_0101_0101_0101)) >> np.uint64(56)
    return ring.reduce(ones + np.uint64(params.coeff_modulus - _ERROR_MIDDLE), params).reshape(shape)


def decrypt_segments(segments: Iterable[bytes], group_key: bytes, layout: Layout) -> Int64Vector:
    """Decrypt the segments of a sum into int64[vector_length], exactly.

    The result is meaningless, not an error, if the sum was made under another group key: compare keyed digests.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if they are not exactly the segments of one sum of this layout;
            INVALID_ARGUMENT for a bad key or one of another parameter set.
    """
    _require_set(group_key, layout)
    values = np.empty(layout.vector_length, dtype=np.int64)
    seen = 0
    with _multiplier(layout.params, group_key) as times_key:
        for index, segment in enumerate(segments):
            if index == layout.segments:
                raise FedmeshError(Code.CIPHERTEXT_INVALID, f"a sum of this form has {layout.segments} segment(s)")
            start, count = layout.values(index)
            values[start : start + count] = _decrypt(layout, index, segment, times_key)
            seen += 1
    if seen != layout.segments:
        raise FedmeshError(
            Code.CIPHERTEXT_INVALID, f"a sum of this form has {layout.segments} segment(s), {seen} were there"
        )
    return values


def _decrypt(layout: Layout, index: int, segment: bytes, times_key: _Multiply) -> Int64Vector:
    params = layout.params
    c0, c1 = wire.split_sum(layout, index, segment)
    plain = np.zeros_like(c1)
    phase = times_key(c1).reshape(-1)[: c0.size] + c0
    plain.reshape(-1)[: c0.size] = ring.unscale(ring.reduce(phase, params), params)
    return encoding.decode(plain, params, layout.lanes, layout.values(index)[1])


def _require_set(group_key: bytes, layout: Layout) -> None:
    held = group_key_parameters(group_key)
    if not held.shares_keys_with(layout.params):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"the group key belongs to {held.name}, this sum uses {layout.params.name}"
        )


def round_context(job_id: str, round_number: int, attempt: int) -> bytes:
    """Canonical bytes that name one attempt at one round, for `keyed_digest`."""
    job = job_id.encode()
    return struct.pack("<I", len(job)) + job + struct.pack("<QQ", round_number, attempt)


def keyed_digest(group_key: bytes, context: bytes, ciphertext_sha256: bytes, plaintext: Int64Vector) -> bytes:
    """The digest that a hospital signs after decrypting: it shows agreement without revealing the sum.

    HMAC-SHA256 (RFC 2104) under a key derived from the group key by HKDF-SHA256 (RFC 5869), over the length-prefixed
    context (see `round_context`), the hash of the encrypted sum and the plaintext as little-endian int64. A plain hash
    would let the centre test guesses of the sum.

    Returns:
        32 bytes.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad key, a hash that is not 32 bytes, or a plaintext that is not int64[n].
    """
    group_key_parameters(group_key)
    if len(ciphertext_sha256) != hashlib.sha256().digest_size:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the ciphertext hash must be 32 bytes")
    if plaintext.ndim != 1 or plaintext.dtype != np.int64:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the plaintext must be int64[n]")
    key = HKDF(SHA256(), length=32, salt=None, info=b"fedmesh secure-sum digest v1").derive(group_key)
    mac = hmac.new(key, digestmod=hashlib.sha256)
    mac.update(struct.pack("<Q", len(context)) + context + ciphertext_sha256 + struct.pack("<Q", plaintext.size))
    mac.update(plaintext.astype("<i8", copy=False).tobytes())
    return mac.digest()


@contextmanager
def _multiplier(params: ParameterSet, group_key: bytes) -> Iterator[_Multiply]:
    try:
        coefficients = _key_coefficients(params, group_key)
        _require_sound(coefficients)
    except FedmeshError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key is damaged") from error
    with seal.multiplier(params, coefficients) as multiply:
        yield multiply
