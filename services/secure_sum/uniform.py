"""c1 of a fresh ciphertext: uniform polynomials over Z_q, expanded from public seeds.

AES-128 in counter mode (NIST SP 800-38A) gives 8 little-endian bytes a coefficient, of which the low 60 bits count;
what is not below q is passed over, once in 2^46 coefficients, and the first N that remain are c1. The first half of a
seed is the key, the second the counter's first value, a big-endian number of 128 bits. The seed is public, so this
leans on AES-128 as an ideal cipher, as FrodoKEM does for its public matrix (Frodo.Gen with AES), not on secrecy. SEAL's
own generator, BLAKE2xb, is many times slower, and expanding the seeds of all uploads was most of what adding and
checking a sum cost.
"""

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from services.common.errors import Code, FedmeshError
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import ParameterSet

SEED_BYTES: Final = 32
_WORD_BYTES: Final = 8
_KEY_BYTES: Final = 16
# Draws beyond N that are looked at together, should one of N be passed over.
_SPARE: Final = 64


def expand(seed: bytes, params: ParameterSet) -> Coefficients:
    """The polynomial of a 32-byte seed, uint64[N] below q. Every seed has one.

    Raises:
        FedmeshError: INVALID_ARGUMENT for a seed of another length.
    """
    if len(seed) != SEED_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the seed of a ciphertext has {SEED_BYTES} bytes")
    degree = params.poly_modulus_degree
    found = _draws(seed, degree, params)
    if found.max() < params.coeff_modulus:
        return found
    draws = degree
    while True:
        draws += _SPARE
        found = _draws(seed, draws, params)
        found = found[found < params.coeff_modulus]
        if found.size >= degree:
            return found[:degree]


def _draws(seed: bytes, count: int, params: ParameterSet) -> Coefficients:
    stream = Cipher(AES(seed[:_KEY_BYTES]), CTR(seed[_KEY_BYTES:])).encryptor().update(bytes(count * _WORD_BYTES))
    drawn: Coefficients = np.frombuffer(stream, dtype="<u8") & np.uint64((1 << params.coeff_modulus_bits) - 1)
    return drawn
