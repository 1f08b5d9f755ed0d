"""Rosters: who is a member, with which keys, and how one list of members follows another.

A roster's signing and sealing keys are made by the hospitals and change only by a roster that hospitals signed. The
centre runs the certificate authority, so a TLS certificate alone makes nobody a member.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import Field

from services.common.config import read_secret
from services.common.errors import Code, FedmeshError
from services.plans.document import Strict, canonical_json, read_file, validate_json
from services.secure_sum import cohort, derive
from services.secure_sum.statements import (
    MAX_MEMBERS,
    Hex32,
    Name,
    RosterMember,
    RosterStatement,
    parse,
    sign_bytes,
    verify,
)


class _KeyFile(Strict):
    type: Literal["fedmesh member keys v1"]
    hospital_id: Name
    signing: Hex32
    sealing: Hex32


class _Signature(Strict):
    hospital_id: Name
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class _RosterFile(Strict):
    statement: str
    signatures: Annotated[tuple[_Signature, ...], Field(max_length=MAX_MEMBERS)]


@dataclass(frozen=True)
class MemberKeys:
    """A hospital's long-lived private keys. They never leave it."""

    hospital_id: str
    signing: Ed25519PrivateKey = field(repr=False)
    sealing: X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls, hospital_id: str) -> Self:
        """Fresh keys from the operating system's generator."""
        return cls(hospital_id, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises: FedmeshError(CONFIG_INVALID) when the file is missing, open to other users, or holds something else.
        """
        found = validate_json(_KeyFile, read_secret(path).encode(), f"the key file {path.name}", Code.CONFIG_INVALID)
        return cls(
            found.hospital_id,
            Ed25519PrivateKey.from_private_bytes(bytes.fromhex(found.signing)),
            X25519PrivateKey.from_private_bytes(bytes.fromhex(found.sealing)),
        )

    def save(self, path: Path) -> None:
        """Write a new file of mode 0600; it is on disk when this returns.

        Raises: FedmeshError(CONFIG_INVALID) when it exists already (keys are never overwritten) or cannot be written.
        """
        text = canonical_json(
            _KeyFile(
                type="fedmesh member keys v1",
                hospital_id=self.hospital_id,
                signing=self.signing.private_bytes_raw().hex(),
                sealing=self.sealing.private_bytes_raw().hex(),
            )
        )
        _write_new(path, text + b"\n", "the member keys")

    def public(self) -> RosterMember:
        """What the roster says about this hospital."""
        return RosterMember(
            hospital_id=self.hospital_id,
            signing_key=self.signing.public_key().public_bytes_raw().hex(),
            sealing_key=self.sealing.public_key().public_bytes_raw().hex(),
        )


@dataclass(frozen=True)
class Roster:
    """A roster that was verified, or comes from a store that verified it."""

    statement: RosterStatement
    sha256: str

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The members, sorted; a member's place here, counted from 1, is its position."""
        return tuple(member.hospital_id for member in self.statement.members)

    @property
    def size(self) -> int:
        """n."""
        return len(self.ids)

    @property
    def threshold(self) -> int:
        """t."""
        return cohort.threshold(self.size)

    @property
    def colluders(self) -> int:
        """f."""
        return cohort.colluders(self.size)

    def position(self, hospital_id: str) -> int:
        """Place in the roster from 1: the x of its Shamir shares, and what the sign of a pair mask follows from.

        Raises: FedmeshError(STATEMENT_INVALID) when it is not a member.
        """
        return self._members[self._require(hospital_id)][0]

    def signing_key(self, hospital_id: str) -> bytes:
        """Ed25519 public key, 32 bytes. Raises: as `position`."""
        return self._members[self._require(hospital_id)][1]

    def sealing_key(self, hospital_id: str) -> bytes:
        """X25519 public key, 32 bytes. Raises: as `position`."""
        return self._members[self._require(hospital_id)][2]

    def __contains__(self, hospital_id: object) -> bool:
        return hospital_id in self._members

    def _require(self, hospital_id: str) -> str:
        if hospital_id not in self._members:
            raise FedmeshError(Code.STATEMENT_INVALID, f"{hospital_id[:64]!r} is not a member of the roster")
        return hospital_id

    @cached_property
    def _members(self) -> dict[str, tuple[int, bytes, bytes]]:
        return {
            member.hospital_id: (i, bytes.fromhex(member.signing_key), bytes.fromhex(member.sealing_key))
            for i, member in enumerate(self.statement.members, start=1)
        }


def found(consortium: str, members: Sequence[RosterMember]) -> bytes:
    """The statement of a founding roster, for every member to sign.

    Raises: FedmeshError(INVALID_ARGUMENT) when these cannot be members together.
    """
    return _statement(consortium, 1, "", members)


def succeed(current: Roster, members: Sequence[RosterMember]) -> bytes:
    """The statement of the roster after `current`, for at least t of `current`'s members to sign.

    Raises: FedmeshError(INVALID_ARGUMENT) when these cannot be members together.
    """
    return _statement(current.statement.consortium, current.statement.version + 1, current.sha256, members)


def sign_roster(statement: bytes, keys: MemberKeys) -> bytes:
    """A member's signature under a roster, 64 bytes. Sign one successor of a roster, never a second one.

    Raises: FedmeshError(STATEMENT_INVALID) when it is no roster, or lists the signer with keys other than its own.
    """
    listed = {member.hospital_id: member for member in _parse(statement).members}
    if listed.get(keys.hospital_id, keys.public()) != keys.public():
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"the roster lists {keys.hospital_id} with keys that are not its own"
        )
    return sign_bytes(statement, keys)


def verify_founding(statement: bytes, signatures: Mapping[str, bytes]) -> Roster:
    """The founding roster, signed by every member and by nobody else.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    roster = as_roster(statement)
    if roster.statement.version != 1:
        _refuse("this is not a founding roster: its version is not 1")
    missing = sorted(set(roster.ids) - signatures.keys())
    if missing:
        _refuse(f"a founding roster needs the signature of every member: {', '.join(missing)} did not sign")
    _verify_all(statement, signatures, roster)
    return roster


def verify_successor(current: Roster, statement: bytes, signatures: Mapping[str, bytes]) -> Roster:
    """The roster that follows `current`, signed by at least t of `current`'s members and by nobody else.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    following = as_roster(statement)
    said = following.statement
    if said.previous != current.sha256 or said.version != current.statement.version + 1:
        _refuse(f"this roster does not follow version {current.statement.version} ({current.sha256[:16]})")
    if said.consortium != current.statement.consortium:
        _refuse("a roster cannot change the consortium")
    if len(signatures) < current.threshold:
        _refuse(f"a roster needs {current.threshold} signatures of members of the one before, it has {len(signatures)}")
    _verify_all(statement, signatures, current)
    return following


def as_roster(statement: bytes) -> Roster:
    """A roster whose signatures are verified elsewhere.

    Raises: FedmeshError(STATEMENT_INVALID) when the statement is no roster.
    """
    return Roster(_parse(statement), hashlib.sha256(statement).hexdigest())


def maker_order(roster: Roster, epoch: int) -> tuple[str, ...]:
    """The members in the order in which they make the epoch, should those before not answer."""
    return tuple(
        sorted(roster.ids, key=lambda name: derive.digest(b"fedmesh epoch maker v1", roster.sha256, str(epoch), name))
    )


def load_roster_file(path: Path) -> Roster:
    """Read and verify the founding roster, which reached this hospital out of band.

    Raises: FedmeshError(CONFIG_INVALID) when the file is missing or damaged; (STATEMENT_INVALID) as `verify_founding`.
    """
    what = f"the roster file {path.name}"
    content = validate_json(_RosterFile, read_file(path, Code.CONFIG_INVALID), what, Code.CONFIG_INVALID)
    signatures = {item.hospital_id: bytes.fromhex(item.signature) for item in content.signatures}
    if len(signatures) != len(content.signatures):
        raise FedmeshError(Code.CONFIG_INVALID, f"{what} has two signatures of one hospital")
    return verify_founding(content.statement.encode(), signatures)


def save_roster_file(path: Path, statement: bytes, signatures: Mapping[str, bytes]) -> None:
    """Write a founding roster with its signatures into a new file.

    Raises: FedmeshError(STATEMENT_INVALID) as `verify_founding`; (CONFIG_INVALID) when the file exists or cannot be
        written.
    """
    verify_founding(statement, signatures)
    listed = [{"hospital_id": name, "signature": signatures[name].hex()} for name in sorted(signatures)]
    text = json.dumps({"signatures": listed, "statement": statement.decode("ascii")}, indent=1)
    _write_new(path, text.encode() + b"\n", "the roster")


def _statement(consortium: str, version: int, previous: str, members: Iterable[RosterMember]) -> bytes:
    ordered = tuple(sorted(members, key=lambda member: member.hospital_id))
    try:
        statement = RosterStatement(consortium=consortium, version=version, previous=previous, members=ordered).encode()
        _parse(statement)
    except (ValueError, FedmeshError) as error:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"these cannot be the members of a roster: it needs 2 to {MAX_MEMBERS}, each once, with keys of their own",
        ) from error
    return statement


def _parse(statement: bytes) -> RosterStatement:
    found = parse(RosterStatement, statement)
    for member in found.members:
        derive.require_public_key(bytes.fromhex(member.sealing_key), member.hospital_id)
    return found


def _verify_all(statement: bytes, signatures: Mapping[str, bytes], roster: Roster) -> None:
    for hospital_id, signature in signatures.items():
        verify(statement, hospital_id, signature, roster)


def _refuse(message: str) -> NoReturn:
    raise FedmeshError(Code.STATEMENT_INVALID, message)


def _write_new(path: Path, text: bytes, what: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot write {what} to {path}: {error.strerror}") from error
