"""Shares of an attempt's two seeds: Shamir (1979) over GF(2^128), each pair sealed to its holder.

Any t shares of a seed give it, t - 1 say nothing. x is the holder's position in the roster. PyCryptodome is imported
where it is used: the aggregator checks openings without it.
"""

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive
from services.secure_sum.derive import SEED_BYTES

_NONCE_BYTES: Final = 12


class SharePair(NamedTuple):
    """The shares that one hospital holds of another's seeds, 16 bytes each."""

    self_share: bytes
    mask_share: bytes


def split(seed: bytes, threshold: int, size: int) -> dict[int, bytes]:
    """Share a 16-byte seed among positions 1..size; fresh randomness from the operating system at every call."""
    from Crypto.Protocol.SecretSharing import Shamir

    if len(seed) != SEED_BYTES or not 2 <= threshold <= size:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot share {len(seed)} bytes as {threshold} of {size}")
    return dict(Shamir.split(threshold, size, seed, ssss=False))


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The seed that the first `threshold` of these shares (by position -> 16 bytes) give.

    Shares that do not belong together give some other value, not an error: compare with what was committed to.

    Raises: FedmeshError(INVALID_ARGUMENT) when there are fewer than `threshold`.
    """
    from Crypto.Protocol.SecretSharing import Shamir

    if len(shares) < threshold or any(x < 1 for x in shares):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{len(shares)} shares, {threshold} are needed")
    return bytes(Shamir.combine(list(shares.items())[:threshold], ssss=False))


def seal(pair: SharePair, private: X25519PrivateKey, peer_public: bytes, context: bytes) -> bytes:
    """Encrypt both shares to one holder: nonce and AES-256-GCM (NIST SP 800-38D), 60 bytes.

    The key is HKDF of X25519 of the attempt's transport keys and serves one direction: `context` names the sender.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _cipher(private, peer_public, context).encrypt(nonce, pair.self_share + pair.mask_share, context)


def open_box(box: bytes, private: X25519PrivateKey, peer_public: bytes, context: bytes) -> SharePair | None:
    """What `seal` put into a box; None when it does not open."""
    try:
        opened = _cipher(private, peer_public, context).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], context)
    except InvalidTag:
        return None
    if len(opened) != 2 * SEED_BYTES:
        return None
    return SharePair(opened[:SEED_BYTES], opened[SEED_BYTES:])


def _cipher(private: X25519PrivateKey, peer_public: bytes, context: bytes) -> AESGCM:
    return AESGCM(derive.key(derive.exchange(private, peer_public), b"fedmesh share box v1", context))
