"""Cosignatures of witnesses: C2SP tlog-cosignature, `cosignature/v1` with Ed25519 (signature type 0x04).

A cosignature says: at this time, the largest consistent tree that this witness has seen of the log has this root. It is
a signature line of the checkpoint's note, so that a checkpoint with its cosignatures is one note in C2SP's format.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.errors import Code, FedmeshError
from services.transparency.checkpoint import parse_signature, signature_line, split_note

_ED25519_COSIGNATURE: Final = b"\x04"
_KEY_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_SIGNATURE_BYTES: Final = 64
_RAW_BYTES: Final = _KEY_ID_BYTES + _TIME_BYTES + _SIGNATURE_BYTES
_MAX_TIME: Final = 2**63 - 1


@dataclass(frozen=True)
class WitnessKey:
    """A witness's name and Ed25519 public key (32 bytes). `key_id` (4 bytes) tells keys apart; it proves nothing."""

    name: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        """SHA-256(name || 0x0A || 0x04 || public key)[:4] (tlog-cosignature, section Format)."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519_COSIGNATURE + self.public).digest()[:_KEY_ID_BYTES]


def witness_name(consortium: str, hospital_id: str) -> str:
    """The name under which a hospital cosigns."""
    return f"{consortium}/hospital/{hospital_id}"


def cosign(note: str, name: str, private: Ed25519PrivateKey, timestamp: int) -> str:
    """A witness's signature line for a checkpoint that it has verified.

    timestamp: now, in seconds since 1970 UTC.

    Raises: FedmeshError(PROOF_INVALID) when the note is malformed.
    """
    text, _ = split_note(note)
    key = WitnessKey(name, private.public_key().public_bytes_raw())
    signature = private.sign(_message(text, timestamp))
    return signature_line(name, key.key_id + timestamp.to_bytes(_TIME_BYTES, "big") + signature)


def attach(note: str, lines: Iterable[str]) -> str:
    """The note with these signature lines after its own."""
    return note + "".join(lines)


def log_signed(note: str, origin: str) -> str:
    """The note with the signatures of `origin` alone: what the log itself said.

    Raises: FedmeshError(PROOF_INVALID) when the note is malformed.
    """
    text, signatures = split_note(note)
    return attach(f"{text}\n", (signature_line(name, raw) for name, raw in signatures if name == origin))


def verify_line(note: str, line: str, key: WitnessKey) -> int:
    """Check one signature line (with its newline) of a witness under a checkpoint; its time, seconds since 1970 UTC.

    Raises: FedmeshError(PROOF_INVALID) when it is malformed, of another witness or key, or wrong.
    """
    text, _ = split_note(note)
    if not line.endswith("\n"):
        raise _invalid("a cosignature is one line that ends in a newline")
    name, raw = parse_signature(line[:-1])
    if name != key.name or raw[:_KEY_ID_BYTES] != key.key_id:
        raise _invalid(f"the cosignature is not one of {key.name} with this key")
    return _verify(text, raw, key)


def witnesses(note: str, keys: Iterable[WitnessKey]) -> dict[str, int]:
    """Who of these witnesses cosigned a checkpoint: its name, and when, in seconds since 1970 UTC.

    Lines of other names and keys are passed over; so is everything that the log itself signed.

    Raises: FedmeshError(PROOF_INVALID) when the note is malformed, or a line of one of these keys is wrong.
    """
    text, signatures = split_note(note)
    known = {(key.name, key.key_id): key for key in keys}
    found: dict[str, int] = {}
    for name, raw in signatures:
        key = known.get((name, raw[:_KEY_ID_BYTES]))
        if key is not None:
            found[name] = max(found.get(name, 0), _verify(text, raw, key))
    return found


def _verify(text: str, raw: bytes, key: WitnessKey) -> int:
    timestamp = int.from_bytes(raw[_KEY_ID_BYTES : _KEY_ID_BYTES + _TIME_BYTES], "big")
    if len(raw) != _RAW_BYTES or timestamp > _MAX_TIME:
        raise _invalid(f"the cosignature of {key.name} has another form than cosignature/v1")
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(raw[-_SIGNATURE_BYTES:], _message(text, timestamp))
    except (InvalidSignature, ValueError):
        raise _invalid(f"the cosignature of {key.name} is wrong") from None
    return timestamp


def _message(text: str, timestamp: int) -> bytes:
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()


def _invalid(message: str) -> FedmeshError:
    return FedmeshError(Code.PROOF_INVALID, message)
