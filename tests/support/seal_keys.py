"""Group keys as SEAL's own, for tests that compare with what SEAL does."""

from typing import Any

from tenseal import sealapi

from services.secure_sum import seal, secret
from services.secure_sum.parameters import DEFAULT


def load_key(group_key: bytes, file: seal.MemoryFile) -> Any:
    """The group key as a SecretKey."""
    coefficients = secret._key_coefficients(DEFAULT, group_key)
    return seal.load_plaintext(DEFAULT, file, coefficients, sealapi.SecretKey(), ntt=True)
