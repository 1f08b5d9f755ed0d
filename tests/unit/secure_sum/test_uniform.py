import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from services.common.errors import FedmeshError
from services.secure_sum import uniform
from services.secure_sum.parameters import DEFAULT, ParameterSet

SEED = bytes(range(32))
HALF = replace(DEFAULT, name="half", coeff_modulus=(1 << 59) + 1)
"""Passes over every second draw."""


def told_otherwise(seed: bytes, params: ParameterSet) -> list[int]:
    """The definition, block by block."""
    block = Cipher(AES(seed[:16]), ECB()).encryptor()
    found: list[int] = []
    counter = int.from_bytes(seed[16:], "big")
    while len(found) < params.poly_modulus_degree:
        drawn = block.update(counter.to_bytes(16, "big"))
        counter = (counter + 1) % 2**128
        for half in (drawn[:8], drawn[8:]):
            value = int.from_bytes(half, "little") % 2**60
            if value < params.coeff_modulus:
                found.append(value)
    return found[: params.poly_modulus_degree]


@pytest.mark.parametrize("seed", [SEED, bytes(32), b"\xff" * 32])
@pytest.mark.parametrize("params", [DEFAULT, HALF])
def test_a_seed_expands_as_defined(params: ParameterSet, seed: bytes) -> None:
    assert uniform.expand(seed, params).tolist() == told_otherwise(seed, params)


def test_q_itself_is_passed_over() -> None:
    drawn = int(uniform.expand(SEED, DEFAULT).max())
    params = replace(DEFAULT, name="drawn", coeff_modulus=drawn)
    expanded = uniform.expand(SEED, params).tolist()
    assert drawn not in expanded
    assert expanded == told_otherwise(SEED, params)


def test_the_expansion_never_changes() -> None:
    """Stored uploads and signed statements depend on it."""
    digest = hashlib.sha256(uniform.expand(SEED, DEFAULT).astype("<u8").tobytes()).hexdigest()
    assert digest == "824807425940fc316a67fc582b93197aef2de996804ba956b92649e401914e2c"


def test_it_looks_uniform() -> None:
    drawn = np.concatenate([uniform.expand(bytes([i] * 32), DEFAULT) for i in range(64)])
    counts = np.bincount((drawn >> np.uint64(52)).astype(np.int64), minlength=256)
    expected = drawn.size / 256
    # Chi-squared with 255 degrees of freedom has a standard deviation of 22.6; the draws are always the same.
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6
    assert np.unique(drawn).size == drawn.size


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_seed_has_32_bytes(length: int) -> None:
    with pytest.raises(FedmeshError, match="32 bytes"):
        uniform.expand(bytes(length), DEFAULT)
