"""Every key, commitment and associated data of the secure sum, each under a domain of its own. Needs no numpy.

Whatever is hashed or mixed into a derivation is a list of parts, each preceded by its length: no two lists look alike.
Keys come from HKDF-SHA256 (RFC 5869, no salt: the inputs are uniform or X25519 outputs), X25519 (RFC 7748).
"""

import hashlib
from functools import lru_cache
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common.errors import Code, FedmeshError
from services.secure_sum.statements import AttemptRef

SEED_BYTES: Final = 16
"""Mask seed and self seed: what Shamir's scheme over GF(2^128) can share."""
KEY_BYTES: Final = 32

ShareKind = Literal["self", "mask"]
MaskPlan = tuple[tuple[bytes, int], ...]
"""Keys of the mask generator, each with the sign (+1 or -1) under which its stream is added."""

_FIELD_PRIME: Final = 2**255 - 19
_LOW_ORDER: Final = frozenset(
    u.to_bytes(KEY_BYTES, "little")
    for u in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _FIELD_PRIME - 1,
    )
)
"""The canonical public keys that every private key takes to zero (https://cr.yp.to/ecdh.html#validate)."""


def parts(domain: bytes, *items: bytes | str) -> bytes:
    """The domain and the items, each preceded by its length in 4 bytes, big-endian. Text is ASCII."""
    joined = len(domain).to_bytes(4, "big") + domain
    for item in items:
        part = item.encode("ascii") if isinstance(item, str) else item
        joined += len(part).to_bytes(4, "big") + part
    return joined


def digest(domain: bytes, *items: bytes | str) -> bytes:
    """SHA-256 over `parts`, 32 bytes."""
    return hashlib.sha256(parts(domain, *items)).digest()


def key(secret: bytes, domain: bytes, *items: bytes | str) -> bytes:
    """32 bytes by HKDF-SHA256 of a secret with `parts` as info."""
    return HKDF(SHA256(), length=KEY_BYTES, salt=None, info=parts(domain, *items)).derive(secret)


def mask_key_pair(mask_seed: bytes) -> X25519PrivateKey:
    """The mask key that follows from a 16-byte mask seed."""
    return X25519PrivateKey.from_private_bytes(key(_seed(mask_seed), b"fedmesh mask key v1"))


def seed_commitment(attempt: AttemptRef, hospital_id: str, self_seed: bytes) -> str:
    """What an advert says about the self seed; hex. Hides it: the seed has 128 random bits."""
    return digest(b"fedmesh self seed v1", attempt.encode(), hospital_id, _seed(self_seed)).hex()


def share_commitment(attempt: AttemptRef, sender: str, recipient: str, kind: ShareKind, share: bytes) -> str:
    """What a `share` statement says about one sealed share; hex. A share is as random as a seed."""
    return digest(b"fedmesh share v1", attempt.encode(), sender, recipient, kind, _seed(share)).hex()


def self_key(self_seed: bytes, attempt: AttemptRef, hospital_id: str) -> bytes:
    """Key of the hospital's own mask, 32 bytes."""
    return key(_seed(self_seed), b"fedmesh self mask v1", attempt.encode(), hospital_id)


def pair_key(private: X25519PrivateKey, peer_public: bytes, attempt: AttemptRef, a: str, b: str) -> bytes:
    """Key of the mask that hospitals `a` and `b` have in common, 32 bytes; the same from both sides.

    Bound to both mask keys as well: X25519 alone gives one secret for several spellings of a peer.

    Raises: FedmeshError(STATEMENT_INVALID) when `peer_public` is no fit public key.
    """
    own = private.public_key().public_bytes_raw()
    shared = exchange(private, peer_public)
    return key(shared, b"fedmesh pair mask v1", attempt.encode(), *sorted((a, b)), *sorted((own, peer_public)))


def box_context(attempt: AttemptRef, adverts: str, sender: str, recipient: str) -> bytes:
    """What a box of shares is bound to: key derivation and associated data."""
    return parts(b"fedmesh share box v1", attempt.encode(), adverts, sender, recipient)


def exchange(private: X25519PrivateKey, peer_public: bytes) -> bytes:
    """X25519, 32 bytes.

    Raises: FedmeshError(STATEMENT_INVALID) for a peer key of low order, which would give zero.
    """
    try:
        return private.exchange(_public_key(peer_public))
    except ValueError:
        raise FedmeshError(Code.STATEMENT_INVALID, "an X25519 public key is of low order") from None


def require_public_key(public: bytes, hospital_id: str) -> None:
    """Check a hospital's X25519 public key: canonical (below 2^255 - 19) and not of low order.

    Raises: FedmeshError(STATEMENT_INVALID) naming the hospital.
    """
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD_PRIME or public in _LOW_ORDER:
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"{hospital_id} brings an unfit X25519 public key", culprit=hospital_id
        )


@lru_cache(maxsize=1024)
def _public_key(public: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(public)


def _seed(seed: bytes) -> bytes:
    if len(seed) != SEED_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a seed or share has {SEED_BYTES} bytes")
    return seed
