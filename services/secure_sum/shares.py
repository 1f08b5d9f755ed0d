"""Shares of an attempt's two seeds: Shamir (1979) over GF(2^128), each pair sealed to its holder.

Any t shares of a seed give it, t - 1 say nothing. x is the holder's position in the roster. A seed and a share are the
coefficients of a field element, that of x^127 first. docs/adr/0011: why the field is our own, and timing.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, field
from services.secure_sum.derive import SEED_BYTES

_NONCE_BYTES: Final = 12


class SharePair(NamedTuple):
    """The shares that one hospital holds of another's seeds, 16 bytes each."""

    self_share: bytes
    mask_share: bytes


def split(seed: bytes, threshold: int, size: int) -> dict[int, bytes]:
    """Share a 16-byte seed among positions 1..size; fresh randomness from the operating system at every call.

    Raises: FedmeshError(INVALID_ARGUMENT) for a seed of another length, or unless 2 <= threshold <= size.
    """
    if len(seed) != SEED_BYTES or not 2 <= threshold <= size:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot share {len(seed)} bytes as {threshold} of {size}")
    drawn = os.urandom(field.BYTES * (threshold - 1))
    coefficients = [_element(seed), *(_element(drawn[i : i + field.BYTES]) for i in range(0, len(drawn), field.BYTES))]
    return {x: _bytes(field.dot(_powers(x, threshold), coefficients)) for x in range(1, size + 1)}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The seed that the first `threshold` of these shares (by position -> 16 bytes) give.

    Shares that do not belong together give some other value, not an error: compare with what was committed to.

    Raises: FedmeshError(INVALID_ARGUMENT) when there are fewer than `threshold`, or one cannot be a share.
    """
    if len(shares) < threshold or any(not 1 <= x < 1 << field.BITS for x in shares):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{len(shares)} shares, {threshold} are needed")
    if any(len(share) != SEED_BYTES for share in shares.values()):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a share has {SEED_BYTES} bytes")
    # Sorted, so that the weights of a set of holders are computed once, whatever its order.
    chosen = sorted(islice(shares.items(), threshold))
    return _bytes(field.dot(_weights(tuple(x for x, _ in chosen)), (_element(share) for _, share in chosen)))


@lru_cache(maxsize=256)
def _powers(x: int, count: int) -> tuple[int, ...]:
    """x^0 to x^(count - 1), spread. Public, like everything that is cached here."""
    return tuple(field.spread(field.product([x] * i)) for i in range(count))


@lru_cache(maxsize=256)
def _weights(positions: tuple[int, ...]) -> tuple[int, ...]:
    """What the shares at these positions are multiplied by to give the value at 0 (Lagrange), spread.

    The weight of x is the product of y / (x + y) over all other positions y.
    """
    every = field.product(positions)
    weights = []
    for x in positions:
        divisor = field.product((x, *(x ^ y for y in positions if y != x)))
        weights.append(field.spread(field.multiply(every, field.inverse(divisor))))
    return tuple(weights)


def _element(value: bytes) -> int:
    return field.guard(int.from_bytes(value, "big"))


def _bytes(element: int) -> bytes:
    return element.to_bytes(field.BYTES, "big")


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
