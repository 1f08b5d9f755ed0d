"""Sealed model states: what hospitals store with the centre and the centre cannot read. Runs in hospitals only.

Sealing is deterministic, so that hospitals that computed the same state have the same bytes and can compare hashes:
AES-256-GCM-SIV (RFC 8452) under a key of the job and version, with a nonce that is a MAC of the state. Two states
never meet under one nonce, short of a collision, and GCM-SIV would then still only show that they are equal.

A blob is magic "FMST", layout version (2 bytes), zero (2 bytes), epoch (8 bytes, big-endian), nonce (12 bytes), and the
ciphertext, 16 bytes longer than the state.
"""

import hmac
import struct
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive

_HEADER: Final = struct.Struct(">4sHHQ")
_MAGIC: Final = b"FMST"
_LAYOUT: Final = 1
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_KEY_BYTES: Final = 32

OVERHEAD_BYTES: Final = _HEADER.size + _NONCE_BYTES + _TAG_BYTES
"""A sealed state is this much longer than the state."""


def seal_state(state_key: bytes, epoch: int, job_id: str, version: int, state: bytes) -> bytes:
    """Seal a state under the state key of an epoch; the same input gives the same bytes.

    Raises: FedmeshError(INVALID_ARGUMENT) for a key that is not 32 bytes, an empty state, or a negative number.
    """
    if not state or epoch < 0 or version < 0:
        raise FedmeshError(Code.INVALID_ARGUMENT, "an empty state or a negative number cannot be sealed")
    header = _HEADER.pack(_MAGIC, _LAYOUT, 0, epoch)
    context = derive.parts(b"fedmesh state nonce v1", header, job_id, str(version), sha256(state).digest())
    nonce = hmac.digest(_require_key(state_key), context, "sha256")[:_NONCE_BYTES]
    sealed = _cipher(state_key, job_id, version).encrypt(nonce, state, _associated(header, job_id, version))
    return header + nonce + sealed


def sealed_epoch(blob: bytes) -> int:
    """The epoch whose state key opens a blob; not authenticated before `open_state`.

    Raises: FedmeshError(CIPHERTEXT_INVALID) when it is no sealed state.
    """
    if len(blob) <= OVERHEAD_BYTES:
        raise FedmeshError(Code.CIPHERTEXT_INVALID, "the sealed state is truncated")
    magic, layout, zero, epoch = _HEADER.unpack_from(blob)
    if (magic, layout, zero) != (_MAGIC, _LAYOUT, 0):
        raise FedmeshError(Code.CIPHERTEXT_INVALID, "this is no sealed state that this build reads")
    return int(epoch)


def open_state(state_key: bytes, job_id: str, version: int, blob: bytes) -> bytes:
    """The state of this job and version.

    Raises: FedmeshError(CIPHERTEXT_INVALID) when the blob is damaged, or of another job, version or epoch.
    """
    sealed_epoch(blob)
    header, nonce = blob[: _HEADER.size], blob[_HEADER.size : _HEADER.size + _NONCE_BYTES]
    cipher = _cipher(_require_key(state_key), job_id, version)
    try:
        return cipher.decrypt(nonce, blob[_HEADER.size + _NONCE_BYTES :], _associated(header, job_id, version))
    except InvalidTag:
        raise FedmeshError(
            Code.CIPHERTEXT_INVALID, "the sealed state is damaged, or of another job, version or key epoch"
        ) from None


def _cipher(state_key: bytes, job_id: str, version: int) -> AESGCMSIV:
    return AESGCMSIV(derive.key(state_key, b"fedmesh state v1", job_id, str(version)))


def _associated(header: bytes, job_id: str, version: int) -> bytes:
    return derive.parts(b"fedmesh state v1", header, job_id, str(version))


def _require_key(state_key: bytes) -> bytes:
    if len(state_key) != _KEY_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a state key has {_KEY_BYTES} bytes")
    return state_key
