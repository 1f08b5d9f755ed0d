"""Key epochs: one member makes the keys that all hospitals share and nobody else has. Runs in hospitals only.

The group key (BFV secret) and the state key are encrypted once under a random content key (AES-256-GCM); the content
key is sealed to every member's X25519 sealing key by a fresh key pair, HKDF-SHA256 and AES-256-GCM. Each member checks
the signed SHA-256 of what it got, so that a maker cannot give two members different keys unseen.
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
from services.secure_sum.parameters import DEFAULT, ParameterSet
from services.secure_sum.roster import MemberKeys, Roster, maker_order
from services.secure_sum.statements import Box, EpochStatement, Signed, sign

__all__ = ["EpochKeys", "check_epoch", "make_epoch", "maker_order", "open_epoch"]

STATE_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_HEADER: Final = struct.Struct(">4sHHQ32s32s32s")
_MAGIC: Final = b"FMEK"
_VERSION: Final = 1


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
    """Of both keys, hex, as the epoch's statement says; the newest epoch's fingerprint in the coordinator."""

    def to_bytes(self) -> bytes:
        """Everything, for a file inside the hospital."""
        header = _HEADER.pack(
            _MAGIC, _VERSION, 0, self.epoch, bytes.fromhex(self.roster), bytes.fromhex(self.sha256), self.state_key
        )
        return header + self.group_key

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises: FedmeshError(DATA_INVALID) when it is something else.
        """
        if len(data) < _HEADER.size:
            _damaged()
        magic, version, zero, epoch, roster, sha256, state_key = _HEADER.unpack_from(data)
        group_key = data[_HEADER.size :]
        keys = cls(roster.hex(), epoch, group_key, state_key, sha256.hex())
        if (magic, version, zero) != (_MAGIC, _VERSION, 0):
            _damaged()
        if group_key and _digest(keys.roster, epoch, state_key, group_key) != keys.sha256:
            _damaged()
        return keys

    def without_group_key(self) -> Self:
        """The keys of an epoch that no attempt uses any more: states stay readable, sums do not."""
        return replace(self, group_key=b"")


def make_epoch(
    keys: MemberKeys, roster: Roster, epoch: int, params: ParameterSet = DEFAULT, *, without: Collection[str] = ()
) -> tuple[EpochKeys, Signed]:
    """Make the keys of an epoch and seal them to every member. Use them only once the registry took the statement.

    without: members that get no keys, because they are suspended.

    Raises: FedmeshError(STATEMENT_INVALID) when the maker is not a member, (PRIVACY_REFUSED) when fewer than t are
        left.
    """
    roster.position(keys.hospital_id)
    members = [name for name in roster.ids if name not in without or name == keys.hospital_id]
    if len(members) < roster.threshold:
        raise FedmeshError(
            Code.PRIVACY_REFUSED, f"{len(members)} members are not suspended, keys need {roster.threshold} at least"
        )
    group_key, state_key = secret.generate_group_key(params), os.urandom(STATE_KEY_BYTES)
    made = EpochKeys(roster.sha256, epoch, group_key, state_key, _digest(roster.sha256, epoch, state_key, group_key))
    content_key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE_BYTES)
    context = _context(roster.sha256, epoch, keys.hospital_id, params.name, made.sha256)
    content = nonce + AESGCM(content_key).encrypt(nonce, state_key + group_key, context)
    boxes = tuple(
        Box(to=name, box=_seal(content_key, roster.sealing_key(name), context, name).hex()) for name in members
    )
    statement = EpochStatement(
        roster=roster.sha256,
        epoch=epoch,
        maker=keys.hospital_id,
        parameter_set=params.name,
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
    digest = _digest(statement.roster, statement.epoch, state_key, group_key)
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
    except FedmeshError as error:
        _refuse(error.message, maker)
    return EpochKeys(statement.roster, statement.epoch, group_key, state_key, digest)


def _digest(roster: str, epoch: int, state_key: bytes, group_key: bytes) -> str:
    return derive.digest(b"fedmesh epoch keys v1", roster, str(epoch), state_key, group_key).hex()


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
