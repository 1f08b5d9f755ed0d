"""Signed checkpoints of a log: C2SP tlog-checkpoint over C2SP signed-note, with Ed25519 (signature type 0x01).

A checkpoint says "the log `origin` has `size` entries and this root". The name of the log's key equals its origin.
Keys travel as text, as Go's sumdb/note writes them: `name+hash+base64(0x01 || public key)` for those who verify, and
`PRIVATE+KEY+name+hash+base64(0x01 || seed)` for the one who signs.
"""

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.config import read_secret
from services.common.errors import Code, FedmeshError
from services.transparency.merkle import HASH_BYTES, MAX_SIZE

_ED25519: Final = b"\x01"
_SECRET_PREFIX: Final = "PRIVATE+KEY+"  # noqa: S105 - the format's marker, no secret
# Some log, sixteen witnesses and room for the long signatures of the post-quantum kind.
MAX_NOTE_BYTES: Final = 128 * 1024
_DASH: Final = "\u2014 "
_NAME: Final = re.compile(r"[^\s+\x00-\x1f\ud800-\udfff]{1,255}")
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True)
class VerifierKey:
    """A public key and its name. `key_id` (4 bytes) tells keys of one name apart; it proves nothing."""

    name: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        """SHA-256(name || 0x0A || 0x01 || public key)[:4] (signed-note, Ed25519 signatures)."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{_encode(_ED25519 + self.public)}"


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 private key and its name."""

    name: str
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def verifier(self) -> VerifierKey:
        return VerifierKey(self.name, self.private.public_key().public_bytes_raw())


@dataclass(frozen=True)
class Checkpoint:
    """The head of a log: who it is, how many entries it has, and the root hash (32 bytes) over them."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The note text that is signed."""
        return f"{self.origin}\n{self.size}\n{_encode(self.root)}\n"


def parse_verifier_key(text: str) -> VerifierKey:
    """Read a verifier key.

    Raises: FedmeshError(PROOF_INVALID) when it is malformed, of another algorithm, or its hash does not fit.
    """
    name, material = _parse_key(text)
    key = VerifierKey(name, material)
    if str(key) != text:
        raise _invalid("the verifier key's hash does not belong to it")
    return key


def parse_signing_key(text: str) -> SigningKey:
    """Read a signing key.

    Raises: FedmeshError(CONFIG_INVALID) when it is malformed, of another algorithm, or its hash does not fit.
    """
    try:
        name, seed = _parse_key(text.removeprefix(_SECRET_PREFIX))
    except FedmeshError:
        raise FedmeshError(Code.CONFIG_INVALID, "this is not an Ed25519 signing key in note format") from None
    key = SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))
    if _secret_text(key) != text:
        raise FedmeshError(Code.CONFIG_INVALID, "the signing key's hash does not belong to it")
    return key


def generate_key(path: Path, name: str) -> str:
    """Make a signing key in a new file of mode 0600. `name` is the log's origin, `<consortium>/audit`.

    Returns the verifier key. Raises: FedmeshError(CONFIG_INVALID) when the name is unfit, the file exists already (a
    log that changes its key looks like another log) or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise FedmeshError(Code.CONFIG_INVALID, f"{name!r} is no key name: spaces and + are not allowed")
    key = SigningKey(name, Ed25519PrivateKey.generate())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(_secret_text(key) + "\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot write the signing key {path}: {error.strerror}") from error
    return str(key.verifier)


def load_signing_key(path: Path) -> SigningKey:
    """Read the signing key's file.

    Raises: FedmeshError(CONFIG_INVALID) when it is missing, open to other users, or holds no signing key.
    """
    return parse_signing_key(read_secret(path))


def sign_note(text: str, key: SigningKey) -> str:
    """A signed note: the text, an empty line, and one signature.

    Raises: FedmeshError(INVALID_ARGUMENT) when the text does not end in a newline or has control characters.
    """
    if not text.endswith("\n") or _has_controls(text):
        raise FedmeshError(Code.INVALID_ARGUMENT, "a note's text ends in a newline and has no control characters")
    signature = key.verifier.key_id + key.private.sign(text.encode())
    return f"{text}\n{signature_line(key.name, signature)}"


def open_note(note: str, verifier: VerifierKey) -> str:
    """The text of a note, once its signature by `verifier` is checked; signatures of unknown keys are passed over.

    Raises: FedmeshError(PROOF_INVALID) when the note is malformed, or has no or a wrong signature of this key.
    """
    text, signatures = split_note(note)
    found = False
    for name, raw in signatures:
        if name == verifier.name and raw[:4] == verifier.key_id:
            _check_signature(verifier, raw[4:], text)
            found = True
    if not found:
        raise _invalid(f"the note is not signed by {verifier.name}+{verifier.key_id.hex()}")
    return text


def split_note(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The text of a note, and of each of its signatures the key's name and the raw bytes (key id || signature).

    Nothing is verified. Raises: FedmeshError(PROOF_INVALID) when the note is malformed.
    """
    if len(note) > MAX_NOTE_BYTES or _has_controls(note):
        raise _invalid("the note is too large or has control characters")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise _invalid("the note has no signatures")
    return f"{text}\n", [parse_signature(line) for line in signatures[:-1].split("\n")]


def signature_line(name: str, raw: bytes) -> str:
    """The line of a note for a signature. raw: key id || signature."""
    return f"{_DASH}{name} {_encode(raw)}\n"


def sign_checkpoint(checkpoint: Checkpoint, key: SigningKey) -> str:
    """The checkpoint as a signed note.

    Raises: FedmeshError(INVALID_ARGUMENT) when the key is not the one of the log `checkpoint.origin`.
    """
    if checkpoint.origin != key.name:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the key of {key.name} does not sign for {checkpoint.origin}")
    return sign_note(checkpoint.text(), key)


def open_checkpoint(note: str, verifier: VerifierKey) -> Checkpoint:
    """The checkpoint in a signed note, once its signature by the log's own key is checked.

    Raises: FedmeshError(PROOF_INVALID) when the signature, the format or the origin is wrong.
    """
    checkpoint = _parse_text(open_note(note, verifier))
    if checkpoint.origin != verifier.name:
        raise _invalid(f"the checkpoint is of {checkpoint.origin}, the key of {verifier.name}")
    return checkpoint


def _parse_text(text: str) -> Checkpoint:
    # Extension lines are refused: this log writes none, and no monitor could audit them.
    lines = text.split("\n")
    if len(lines) != 4 or not lines[0] or not _SIZE.fullmatch(lines[1]) or int(lines[1]) > MAX_SIZE:
        raise _invalid("a checkpoint has three lines: origin, size and root")
    root = _decode(lines[2])
    if len(root) != HASH_BYTES:
        raise _invalid(f"a checkpoint's root has {HASH_BYTES} bytes")
    return Checkpoint(lines[0], int(lines[1]), root)


def parse_signature(line: str) -> tuple[str, bytes]:
    """Name and raw bytes (key id || signature) of a signature line without its newline.

    Raises: FedmeshError(PROOF_INVALID) when it is malformed.
    """
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not _NAME.fullmatch(name):
        raise _invalid("a signature line is malformed")
    raw = _decode(encoded)
    if len(raw) <= 4:
        raise _invalid("a signature line is too short")
    return name, raw


def _check_signature(verifier: VerifierKey, signature: bytes, text: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(verifier.public).verify(signature, text.encode())
    except (InvalidSignature, ValueError):
        raise _invalid(f"the signature of {verifier.name} is wrong") from None


def _parse_key(text: str) -> tuple[str, bytes]:
    """Name and key material of `name+hash+base64(0x01 || material)`; the caller compares the hash."""
    parts = text.split("+", 2)
    if len(parts) != 3 or not _NAME.fullmatch(parts[0]):
        raise _invalid("a key reads name+hash+base64")
    material = _decode(parts[2])
    if material[:1] != _ED25519 or len(material) != 33:
        raise _invalid("the key is not an Ed25519 key (type 1)")
    return parts[0], material[1:]


def _secret_text(key: SigningKey) -> str:
    material = _encode(_ED25519 + key.private.private_bytes_raw())
    return f"{_SECRET_PREFIX}{key.name}+{key.verifier.key_id.hex()}+{material}"


def _has_controls(text: str) -> bool:
    return any(character < " " and character != "\n" for character in text)


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decode(text: str) -> bytes:
    """Base 64 (RFC 4648, section 4), in its one canonical spelling."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or _encode(raw) != text:
        raise _invalid("base64 is malformed")
    return raw


def _invalid(message: str) -> FedmeshError:
    return FedmeshError(Code.PROOF_INVALID, message)
