"""The key side of the secure sum. Runs in hospitals only; the aggregator never imports this module.

One BFV secret key is shared by all hospitals of a cohort and by nobody else (the *group key*). BFV is not secure
against chosen ciphertexts: decrypt only a sum that a quorum of hospitals committed to, never anything else.
"""

import hashlib
import hmac
import struct
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, public, seal, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.parameters import DEFAULT, ParameterSet, parameter_set

_KEY_HEADER: Final = struct.Struct("<4sHH32s")
_KEY_MAGIC: Final = b"FMGK"
_KEY_VERSION: Final = 1


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
    name = params.name.encode("ascii")
    return _KEY_HEADER.pack(_KEY_MAGIC, _KEY_VERSION, 0, name) + wire.pack(coefficients).tobytes()


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
    if len(group_key) != _KEY_HEADER.size + wire.polynomial_size(params):
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key has the wrong length")
    return params


def encrypt(values: Int64Vector, group_key: bytes, lanes: int = 2) -> bytes:
    """Encrypt int64[n] into an upload: fresh randomness from the operating system at every call.

    Keep the returned bytes and re-send them; encrypting again makes different bytes.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a bad key, lane count, shape or a value outside its lane.
    """
    params = group_key_parameters(group_key)
    coefficients = encoding.encode(values, params, lanes)
    c0 = np.empty_like(coefficients)
    seeds = np.empty((len(coefficients), wire.SEED_BYTES), dtype=np.uint8)
    with seal.memory_file() as file:
        encryptor = sealapi.Encryptor(seal.context(params), _secret_key(params, group_key, file))
        for i, row in enumerate(coefficients):
            c0[i], seed = _encrypt_one(params, encryptor, row, file)
            seeds[i] = np.frombuffer(seed, dtype=np.uint8)
    return wire.write(wire.Kind.UPLOAD, params, values.size, lanes, 1, c0, seeds)


def _encrypt_one(
    params: ParameterSet, encryptor: Any, coefficients: Coefficients, file: seal.MemoryFile
) -> tuple[Coefficients, bytes]:
    plaintext = _plaintext(params, coefficients, file)
    # Only the one-argument overload makes a seeded ciphertext.
    return seal.save_seeded(params, file, encryptor.encrypt_symmetric(plaintext))


def decrypt(sum_blob: bytes, group_key: bytes, vector_length: int, lanes: int = 2) -> Int64Vector:
    """Decrypt a sum into int64[vector_length], exactly.

    The result is meaningless, not an error, if the sum was made under another group key: compare keyed digests.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if the bytes are not exactly one sum of this shape under the key's parameter
            set; INVALID_ARGUMENT for a bad key.
    """
    params = group_key_parameters(group_key)
    blob = wire.parse(sum_blob, wire.Kind.SUM, params, vector_length, lanes)
    pairs = public.polynomials(blob, params)
    coefficients = np.zeros((blob.count, params.poly_modulus_degree), dtype=np.uint64)
    plaintext = sealapi.Plaintext()
    with seal.memory_file() as file:
        decryptor = sealapi.Decryptor(seal.context(params), _secret_key(params, group_key, file))
        for row, pair in zip(coefficients, pairs, strict=True):
            decryptor.decrypt(seal.load_full(params, file, pair), plaintext)
            # SEAL drops leading zero coefficients.
            count = plaintext.coeff_count()
            row[:count] = seal.elements(plaintext.data, count)
    return encoding.decode(coefficients, params, lanes, vector_length)


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


def _plaintext(params: ParameterSet, coefficients: Coefficients, file: seal.MemoryFile) -> Any:
    """A SEAL Plaintext of uint64[N]; its body is parms_id[32] (zero: not in NTT form), count, scale, array."""
    body = bytes(32) + struct.pack("<Qd", coefficients.size, 1.0) + seal.array(coefficients)
    file.write(seal.header(len(body)) + body)
    plaintext = sealapi.Plaintext()
    plaintext.load(seal.context(params), file.path)
    return plaintext


def _secret_key(params: ParameterSet, group_key: bytes, file: seal.MemoryFile) -> Any:
    packed = np.frombuffer(group_key, dtype=np.uint8, offset=_KEY_HEADER.size)
    coefficients = wire.unpack(packed, params, 1)[0]
    body = seal.parms_id(params) + struct.pack("<Qd", coefficients.size, 1.0) + seal.array(coefficients)
    file.write(seal.header(len(body)) + body)
    key = sealapi.SecretKey()
    try:
        key.load(seal.context(params), file.path)
    except (RuntimeError, ValueError) as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the group key is damaged") from error
    return key
