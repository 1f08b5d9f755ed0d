"""The little of Microsoft SEAL that hospitals need: a context, products with the secret key, public-key encryption.

SEAL (through `tenseal.sealapi`, the thin bindings; never TenSEAL's own tensors, whose parsers crash on hostile bytes)
loads and saves only by file path, so bytes pass through an anonymous in-memory file. What SEAL loads is written here,
field by field, in SEAL's own uncompressed format: no length, flag or hash in it comes from a peer. SEAL always saves
compressed (zstd); `_stored` takes the bytes out again.

SEAL 4 serialisation, little-endian: a 16-byte header (magic a15e, 0x10, version major, minor, compression, 0, 0,
uint64 total length) and the body. A ciphertext's body: parms_id[32], is_ntt_form u8, size u64, N u64, number of primes
u64, scale f64, correction factor u64, then an array: header, u64 length, coefficients.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zstandard
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import ParameterSet
from services.secure_sum.wire import SEGMENT_CIPHERTEXTS

_MAGIC: Final = b"\x5e\xa1\x10"
_HEADER_BYTES: Final = 16
_NO_COMPRESSION: Final = 0
# Polynomials that one of SEAL's ciphertexts may have: all are treated alike, whatever they stand for.
_LEAST_POLYNOMIALS: Final = 2
_MOST_POLYNOMIALS: Final = 16
assert SEGMENT_CIPHERTEXTS <= _MOST_POLYNOMIALS
_LEVELS: Final = {128: "TC128", 192: "TC192", 256: "TC256"}


@lru_cache
def context(params: ParameterSet) -> Any:
    """The SEALContext of a parameter set; SEAL itself enforces the security level.

    Raises:
        FedmeshError: INTERNAL if SEAL does not build exactly this set.
    """
    settings = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    settings.set_poly_modulus_degree(params.poly_modulus_degree)
    primes = sealapi.CoeffModulus.Create(params.poly_modulus_degree, [params.coeff_modulus_bits])
    settings.set_coeff_modulus(primes)
    settings.set_plain_modulus(params.plain_modulus)
    level = getattr(sealapi.SEC_LEVEL_TYPE, _LEVELS[params.security_bits])
    built = sealapi.SEALContext(settings, True, level)
    if not built.parameters_set() or [p.value() for p in primes] != [params.coeff_modulus]:
        raise FedmeshError(Code.INTERNAL, f"SEAL cannot build {params.name}: {built.parameters_error_message()}")
    return built


class MemoryFile:
    """An anonymous file in memory, for an API that takes only paths."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.path = f"/proc/self/fd/{descriptor}"

    def write(self, content: bytes) -> None:
        """Replace the content."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def read(self) -> bytes:
        """The whole content."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)


@contextmanager
def memory_file() -> Iterator[MemoryFile]:
    """A `MemoryFile` that is gone afterwards."""
    descriptor = os.memfd_create("seal", os.MFD_CLOEXEC)
    try:
        yield MemoryFile(descriptor)
    finally:
        os.close(descriptor)


@lru_cache
def _version() -> bytes:
    """Major and minor version of the SEAL in use, as its headers carry them."""
    with memory_file() as file:
        sealapi.DynArray(1).save(file.path)
        return file.read()[3:5]


def header(body_bytes: int) -> bytes:
    """SEAL's header in front of an uncompressed body."""
    return _MAGIC + _version() + bytes((_NO_COMPRESSION, 0, 0)) + struct.pack("<Q", _HEADER_BYTES + body_bytes)


def array(coefficients: Coefficients) -> bytes:
    """SEAL's DynArray around uint64[n]."""
    content = struct.pack("<Q", coefficients.size) + coefficients.tobytes()
    return header(len(content)) + content


@lru_cache
def parms_id(params: ParameterSet) -> bytes:
    """SEAL's 32-byte hash of the parameters."""
    return struct.pack("<4Q", *context(params).first_parms_id())


@lru_cache
def _prefix(params: ParameterSet, polynomials: int) -> bytes:
    """A ciphertext's body up to its array: polynomials over one prime, not in NTT form, scale and factor 1."""
    return parms_id(params) + struct.pack("<BQQQdQ", 0, polynomials, params.poly_modulus_degree, 1, 1.0, 1)


def load_ciphertext(params: ParameterSet, file: MemoryFile, polynomials: Coefficients) -> Any:
    """A Ciphertext of 2 to 16 polynomials, uint64[k, N] below q.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if SEAL refuses them.
    """
    body = _prefix(params, len(polynomials)) + array(polynomials)
    file.write(header(len(body)) + body)
    ciphertext = sealapi.Ciphertext()
    try:
        ciphertext.load(context(params), file.path)
    except (RuntimeError, ValueError) as error:
        raise _refused() from error
    return ciphertext


def save_ciphertext(params: ParameterSet, file: MemoryFile, ciphertext: Any) -> Coefficients:
    """The polynomials of a ciphertext, uint64[k, N].

    Raises:
        FedmeshError: INTERNAL if SEAL's format is not the one described above.
    """
    degree, count = params.poly_modulus_degree, ciphertext.size()
    flat, rest = _saved_array(file, ciphertext, _prefix(params, count), count * degree)
    if rest:
        raise _other_format()
    return flat.reshape(count, degree)


@contextmanager
def multiplier(params: ParameterSet, factor: Coefficients) -> Iterator[Callable[[Coefficients], Coefficients]]:
    """A function that multiplies uint64[k, N] below q, k <= 16, by a polynomial modulo X^N + 1 and q.

    factor: the polynomial in NTT form, uint64[N]. The function raises FedmeshError(CIPHERTEXT_INVALID) for what SEAL
    refuses to multiply: nothing but zeros, which no honest ciphertext holds.

    Raises:
        RuntimeError, ValueError: if SEAL refuses the factor.
    """
    evaluator = sealapi.Evaluator(context(params))
    with memory_file() as file:
        loaded = load_plaintext(params, file, factor, sealapi.Plaintext(), ntt=True)

        def multiply(polynomials: Coefficients) -> Coefficients:
            count = len(polynomials)
            if count < _LEAST_POLYNOMIALS:
                polynomials = np.concatenate((polynomials, polynomials))
            ciphertext, product = load_ciphertext(params, file, polynomials), sealapi.Ciphertext()
            try:
                evaluator.transform_to_ntt_inplace(ciphertext)
                evaluator.multiply_plain(ciphertext, loaded, product)
                evaluator.transform_from_ntt_inplace(product)
            except RuntimeError as error:
                raise _refused() from error
            return save_ciphertext(params, file, product)[:count]

        yield multiply


@contextmanager
def public_encryptor(params: ParameterSet, key: Coefficients) -> Iterator[Callable[[], Coefficients]]:
    """A function that encrypts zero under a public key, uint64[2, N] below q: every call gives a fresh uint64[2, N].

    SEAL draws u, e1 and e2 with BLAKE2xb, which it seeds anew from the operating system for every ciphertext.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if SEAL refuses the key.
    """
    evaluator, public = sealapi.Evaluator(context(params)), sealapi.PublicKey()
    with memory_file() as file:
        loaded = load_ciphertext(params, file, key)
        try:
            # SEAL keeps public keys in NTT form, and writes them as it writes ciphertexts.
            evaluator.transform_to_ntt_inplace(loaded)
            file.write(b"")
            loaded.save(file.path)
            public.load(context(params), file.path)
        except (RuntimeError, ValueError) as error:
            raise _refused() from error
        encryptor = sealapi.Encryptor(context(params), public)

        def encrypt_zero() -> Coefficients:
            made = sealapi.Ciphertext()
            encryptor.encrypt_zero(made)
            return save_ciphertext(params, file, made)

        yield encrypt_zero


def load_plaintext(params: ParameterSet, file: MemoryFile, coefficients: Coefficients, into: Any, ntt: bool) -> Any:
    """Load uint64[n] into a Plaintext, with `ntt` one in NTT form; a SecretKey is such a Plaintext too.

    Raises:
        RuntimeError, ValueError: if SEAL refuses it.
    """
    body = _plain_prefix(params, coefficients.size, ntt) + array(coefficients)
    file.write(header(len(body)) + body)
    into.load(context(params), file.path)
    return into


def _plain_prefix(params: ParameterSet, count: int, ntt: bool) -> bytes:
    """A plaintext's body up to its array: parms_id[32] (zero when not in NTT form), count, scale."""
    return (parms_id(params) if ntt else bytes(32)) + struct.pack("<Qd", count, 1.0)


def _saved_array(file: MemoryFile, saved: Any, prefix: bytes, count: int) -> tuple[Coefficients, bytes]:
    """The array in what SEAL saves, after checking everything before it, and the bytes behind it."""
    file.write(b"")
    saved.save(file.path)
    body = _stored(file.read())
    start = len(prefix) + _HEADER_BYTES + 8
    end = start + count * 8
    expected = prefix + header(8 + count * 8) + struct.pack("<Q", count)
    if len(body) < end or not body.startswith(expected):
        raise _other_format()
    return np.frombuffer(body, dtype=np.uint64, count=count, offset=start), body[end:]


def _refused() -> FedmeshError:
    return FedmeshError(Code.CIPHERTEXT_INVALID, "the ciphertext was rejected: SEAL refuses it")


def _other_format() -> FedmeshError:
    return FedmeshError(Code.INTERNAL, "this SEAL writes in another format")


def elements(read: Callable[[int], int], count: int) -> Coefficients:
    """uint64[count] through one of SEAL's element accessors: slow (0.2 us each), for what cannot be saved alone."""
    return np.fromiter(map(read, range(count)), np.uint64, count)


def _stored(saved: bytes) -> bytes:
    """The body of a saved object, decompressed.

    Whether zstd stores or compresses it is a close call: the top four bits of a 60-bit coefficient are always 0.
    """
    content = saved[_HEADER_BYTES:]
    if saved[5] == _NO_COMPRESSION:
        return content
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    except zstandard.ZstdError as error:
        raise FedmeshError(Code.INTERNAL, "this SEAL compresses in another format") from error
