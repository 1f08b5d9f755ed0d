"""Key epochs: one member makes the keys that all hospitals share and nobody else has. Runs in hospitals only.

The group key (BFV secret) and the state key are encrypted once under a random content key (AES-256-GCM); the content
key is sealed to every member's X25519 sealing key by a fresh key pair, HKDF-SHA256 and AES-256-GCM. Each member checks
the signed SHA-256 of what it got, so that a maker cannot give two members different keys unseen.

Where it is wanted, the statement has a public key of the group key besides, in the clear, for whoever encrypts and is
not to decrypt: the maker's signature and the SHA-256 cover it, and each member checks that it belongs to the group key.
"""

import base64
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, secret
from services.secure_sum.opening import check_epoch
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.public_key import PublicKey
from services.secure_sum.roster import MemberKeys, Roster, maker_order
from services.secure_sum.statements import PUBLIC_KEY_BYTES, Box, EpochStatement, Signed, sign

__all__ = ["EpochKeys", "check_epoch", "make_epoch", "maker_order", "open_epoch"]

STATE_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_HEADER: Final = struct.Struct(">4sHHQ32s32s32s")
_MAGIC: Final = b"FMEK"
_VERSION: Final = 1
_PUBLIC_VERSION: Final = 2
"""Of files that have a public key in front of the group key."""


@dataclass(frozen=True)
class EpochKeys:
    """The keys of one epoch. Known to every member of the roster, to nobody else."""

    roster: str
    """SHA-256 of the roster, hex."""
    epoch: int
    group_key: bytes = field(repr=False)
    """As `secret.generate_group_key` makes it; empty once retired."""
    state_key: bytes = field(repr=False)
    """32 bytes; kept for the states that it sealed."""
    sha256: str
    """Of the keys, hex, as the epoch's statement says; the newest epoch's fingerprint in the coordinator."""
    public_key: PublicKey | None = field(default=None, repr=False)
    """Of the group key; None in an epoch that was made without one, and once retired."""

    def require_public_key(self) -> PublicKey:
        """What encrypts under sets with a public key.

        Raises: FedmeshError(WRONG_STATE) when the epoch has none.
        """
        if self.public_key is None:
            raise FedmeshError(
                Code.WRONG_STATE,
                f"key epoch {self.epoch} has no public key: it is over, or was made before a plan needed one or by an "
                "older release; such a plan's rounds wait for the next epoch",
            )
        return self.public_key

    def to_bytes(self) -> bytes:
        """Everything, for a file inside the hospital."""
        public = b"" if self.public_key is None else self.public_key.data
        header = _HEADER.pack(
            _MAGIC,
            _PUBLIC_VERSION if public else _VERSION,
            0,
            self.epoch,
            bytes.fromhex(self.roster),
            bytes.fromhex(self.sha256),
            self.state_key,
        )
        return header + public + self.group_key

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises: FedmeshError(DATA_INVALID) when it is something else.
        """
        if len(data) < _HEADER.size:
            _damaged()
        magic, version, zero, epoch, roster, sha256, state_key = _HEADER.unpack_from(data)
        if magic != _MAGIC or version not in (_VERSION, _PUBLIC_VERSION) or zero != 0:
            _damaged()
        start = _HEADER.size + (PUBLIC_KEY_BYTES if version == _PUBLIC_VERSION else 0)
        public, group_key = data[_HEADER.size : start], data[start:]
        if (group_key or public) and _digest(roster.hex(), epoch, state_key, group_key, public) != sha256.hex():
            _damaged()
        return cls(roster.hex(), epoch, group_key, state_key, sha256.hex(), PublicKey(public) if public else None)

    def without_group_key(self) -> Self:
        """The keys of an epoch that no attempt uses any more: states stay readable, sums do not."""
        return replace(self, group_key=b"", public_key=None)


def make_epoch(
    keys: MemberKeys, roster: Roster, epoch: int, *, without: Collection[str] = (), public: bool = False
) -> tuple[EpochKeys, Signed]:
    """Make the keys of an epoch and seal them to every member. Use them only once the registry took the statement.

    without: members that get no keys, because they are suspended. public: with a public key.

    Raises: FedmeshError(STATEMENT_INVALID) when the maker is not a member, (PRIVACY_REFUSED) when fewer than t are
        left.
    """
    roster.position(keys.hospital_id)
    members = [name for name in roster.ids if name not in without or name == keys.hospital_id]
    if len(members) < roster.threshold:
        raise FedmeshError(
            Code.PRIVACY_REFUSED, f"{len(members)} members are not suspended, keys need {roster.threshold} at least"
        )
    group_key, state_key = secret.generate_group_key(DEFAULT), os.urandom(STATE_KEY_BYTES)
    public_key = secret.make_public_key(group_key) if public else None
    public_bytes = b"" if public_key is None else public_key.data
    digest = _digest(roster.sha256, epoch, state_key, group_key, public_bytes)
    made = EpochKeys(roster.sha256, epoch, group_key, state_key, digest, public_key)
    content_key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE_BYTES)
    context = _context(roster.sha256, epoch, keys.hospital_id, DEFAULT.name, made.sha256)
    content = nonce + AESGCM(content_key).encrypt(nonce, state_key + group_key, context)
    boxes = tuple(
        Box(to=name, box=_seal(content_key, roster.sealing_key(name), context, name).hex()) for name in members
    )
    statement = EpochStatement(
        roster=roster.sha256,
        epoch=epoch,
        maker=keys.hospital_id,
        parameter_set=DEFAULT.name,
        public_key=base64.b64encode(public_bytes).decode("ascii") if public_bytes else None,
        key_sha256=made.sha256,
        content=base64.b64encode(content).decode("ascii"),
        boxes=boxes,
    )
    return made, sign(statement, keys)


def open_epoch(signed: Signed, keys: MemberKeys, roster: Roster) -> EpochKeys:
    """Open the keys of an epoch as a member.

    Raises: FedmeshError(WRONG_STATE) when they were sealed without this member; (STATEMENT_INVALID) with `culprit`,
        the maker, when they do not open, are not the ones that it signed for, or are no keys of the parameter set.
    """
    statement = check_epoch(signed, roster)
    maker = statement.maker
    context = _context(statement.roster, statement.epoch, maker, statement.parameter_set, statement.key_sha256)
    roster.position(keys.hospital_id)
    box = next((box for box in statement.boxes if box.to == keys.hospital_id), None)
    if box is None:
        raise FedmeshError(
            Code.WRONG_STATE, f"key epoch {statement.epoch} was made while {keys.hospital_id} was suspended"
        )
    content = statement.content_bytes()
    try:
        content_key = _unseal(bytes.fromhex(box.box), keys, context)
        opened = AESGCM(content_key).decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError, FedmeshError):
        _refuse("the keys of the epoch do not open", maker)
    state_key, group_key = opened[:STATE_KEY_BYTES], opened[STATE_KEY_BYTES:]
    public_bytes = statement.public_key_bytes()
    digest = _digest(statement.roster, statement.epoch, state_key, group_key, public_bytes)
    if digest != statement.key_sha256:
        _refuse("the keys of the epoch are not those that its statement names", maker)
    try:
        fits = secret.group_key_parameters(group_key).name == statement.parameter_set
    except FedmeshError:
        fits = False
    if not fits:
        _refuse("the epoch's group key is not of its parameter set", maker)
    try:
        secret.require_sound_key(group_key)
        public = PublicKey.from_bytes(public_bytes) if public_bytes else None
        if public is not None:
            secret.require_public_key(group_key, public)
    except FedmeshError as error:
        _refuse(error.message, maker)
    return EpochKeys(statement.roster, statement.epoch, group_key, state_key, digest, public)


def _digest(roster: str, epoch: int, state_key: bytes, group_key: bytes, public_key: bytes = b"") -> str:
    """Of the keys; of an epoch without a public key as before there were any."""
    if not public_key:
        return derive.digest(b"fedmesh epoch keys v1", roster, str(epoch), state_key, group_key).hex()
    return derive.digest(b"fedmesh epoch keys v2", roster, str(epoch), state_key, group_key, public_key).hex()


def _context(roster: str, epoch: int, maker: str, parameter_set: str, key_sha256: str) -> bytes:
    return derive.parts(b"fedmesh epoch v1", roster, str(epoch), maker, parameter_set, key_sha256)


def _seal(content_key: bytes, public: bytes, context: bytes, to: str) -> bytes:
    """Ephemeral public key, nonce, AES-256-GCM of the content key: 92 bytes."""
    ephemeral, nonce = X25519PrivateKey.generate(), os.urandom(_NONCE_BYTES)
    own = ephemeral.public_key().public_bytes_raw()
    key = _box_key(derive.exchange(ephemeral, public), own, public, context, to)
    return own + nonce + AESGCM(key).encrypt(nonce, content_key, context)


def _unseal(box: bytes, keys: MemberKeys, context: bytes) -> bytes:
    ephemeral, nonce, sealed = box[:32], box[32 : 32 + _NONCE_BYTES], box[32 + _NONCE_BYTES :]
    public = keys.sealing.public_key().public_bytes_raw()
    key = _box_key(derive.exchange(keys.sealing, ephemeral), ephemeral, public, context, keys.hospital_id)
    return AESGCM(key).decrypt(nonce, sealed, context)


def _box_key(shared: bytes, ephemeral: bytes, public: bytes, context: bytes, to: str) -> bytes:
    return derive.key(shared, b"fedmesh epoch box v1", context, to, ephemeral, public)


def _refuse(message: str, maker: str) -> NoReturn:
    raise FedmeshError(Code.STATEMENT_INVALID, message, culprit=maker)


def _damaged() -> NoReturn:
    raise FedmeshError(Code.DATA_INVALID, "the stored keys of an epoch are damaged")
