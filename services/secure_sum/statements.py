"""Signed statements: what a hospital says for others to rely on, in exactly one spelling.

A statement is canonical JSON (sorted keys, no spaces, ASCII) with a `type`, signed with Ed25519 (RFC 8032) over
"fedmesh secure-sum v1\\n" || statement. A model is read by pydantic's own parser and written again: bytes that differ
from what it writes are refused, which covers other key orders, keys that occur twice, other numbers and spaces at once.
Every list is sorted and free of repetitions, so that a set has one spelling too. See docs/secure-sum.md.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Protocol, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from pydantic_core import to_json

from services.common.errors import Code, FedmeshError
from services.plans.document import Strict, canonical_json, without_null

SIGNATURE_DOMAIN: Final = b"fedmesh secure-sum v1\n"
SIGNATURE_BYTES: Final = 64
MAX_MEMBERS: Final = 64
"""Members of a roster at most. Bounds every list of hospitals before anything is computed from it."""
MAX_SEGMENTS: Final = 2048
PUBLIC_KEY_BYTES: Final = 30_752

_SMALL_BYTES: Final = 4096
_LARGE_BYTES: Final = 32 * 1024
_LISTS: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True)

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Complaints = Annotated[tuple[Name, ...], Field(max_length=MAX_MEMBERS)]
Counter = Annotated[int, Field(ge=1, lt=1 << 31)]


class Signed(NamedTuple):
    """A statement with its signature."""

    hospital_id: str
    statement: bytes
    signature: bytes
    """64 bytes."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the statement, hex: the name by which other statements refer to it."""
        return hashlib.sha256(self.statement).hexdigest()


class Signers(Protocol):
    """Who may sign: a `Roster`, or `SigningKeys` where only those are known."""

    def signing_key(self, hospital_id: str) -> bytes:
        """Ed25519 public key, 32 bytes. Raises: FedmeshError(STATEMENT_INVALID) for a hospital that may not sign."""
        ...


class Signer(Protocol):
    """Whoever holds a signing key: `MemberKeys`."""

    @property
    def hospital_id(self) -> str: ...
    @property
    def signing(self) -> Ed25519PrivateKey: ...


@dataclass(frozen=True)
class SigningKeys:
    """The signing keys of some hospitals, for a verifier that was told them by somebody who knows the roster."""

    keys: Mapping[str, bytes]

    def signing_key(self, hospital_id: str) -> bytes:
        """Raises: FedmeshError(STATEMENT_INVALID) for anybody else."""
        if hospital_id not in self.keys:
            raise FedmeshError(Code.STATEMENT_INVALID, "the signer is not among those who may sign here")
        return self.keys[hospital_id]


class _Spelled(Strict):
    """A model whose fields are declared in the order in which they are spelled, that of their names."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if list(cls.model_fields) != sorted(cls.model_fields):
            raise TypeError(f"the fields of {cls.__name__} are not declared in the order of their names")


class AttemptRef(_Spelled):
    """One try at one round of one job."""

    attempt: Counter
    job_id: Name
    round: Counter

    def encode(self) -> bytes:
        """Canonical JSON: how an attempt enters hashes and key derivations."""
        return _attempt_json(self.job_id, self.round, self.attempt)


# Every commitment and derivation begins with it, some forty times at one hospital in one attempt. Typed: 1 is not True.
@lru_cache(maxsize=256, typed=True)
def _attempt_json(job_id: str, number: int, attempt: int) -> bytes:
    return canonical_json(AttemptRef.model_construct(job_id=job_id, round=number, attempt=attempt))


class Statement(_Spelled):
    """What all statements have: a type, a spelling, and (except a roster and survivors) one speaker."""

    MAX_BYTES: ClassVar[int] = 64 * 1024

    def encode(self) -> bytes:
        """The canonical bytes, which are signed and hashed."""
        return canonical_json(self)

    @property
    def speaker(self) -> str | None:
        """The hospital that the statement itself names as its author; None where several sign the same bytes."""
        return None


class RosterMember(_Spelled):
    """A hospital and its public keys."""

    hospital_id: Name
    sealing_key: Hex32
    signing_key: Hex32


class RosterStatement(Statement):
    """The members of a consortium. `previous` is the SHA-256 of the roster before, empty in the founding one."""

    consortium: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,251}$")]
    members: Annotated[tuple[RosterMember, ...], Field(min_length=2, max_length=MAX_MEMBERS)]
    previous: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    type: Literal["roster"] = "roster"
    version: Counter

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.require(_ascending(member.hospital_id for member in self.members), "members are not a sorted set")
        keys = {key for member in self.members for key in (member.signing_key, member.sealing_key)}
        self.require(len(keys) == 2 * len(self.members), "a key occurs twice")
        return self.require((self.version == 1) == (self.previous == ""), "only version 1 has nothing before it")


class Box(_Spelled):
    """Keys of an epoch, sealed to one member."""

    box: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,512}$")]
    to: Name


class EpochStatement(Statement):
    """The keys of a key epoch, sealed to every member that is not suspended; see `epoch`.

    `content` and `public_key` are base64. Epochs without a public key are spelled as before there were any.
    """

    MAX_BYTES: ClassVar[int] = 256 * 1024

    boxes: Annotated[tuple[Box, ...], Field(min_length=2, max_length=MAX_MEMBERS)]
    content: str
    epoch: Counter
    key_sha256: Hex32
    maker: Name
    parameter_set: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    public_key: str | None = None
    roster: Hex32
    type: Literal["epoch"] = "epoch"

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(handler(self), "public_key")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.require(_ascending(box.to for box in self.boxes), "boxes are not a sorted set")
        self.require(_is_base64(self.content), "content is not canonical base64")
        if self.public_key is None:
            return self
        self.require(_is_base64(self.public_key), "public_key is not canonical base64")
        return self.require(len(self.public_key_bytes()) == PUBLIC_KEY_BYTES, "public_key has the wrong length")

    def content_bytes(self) -> bytes:
        """The encrypted keys."""
        return base64.b64decode(self.content, validate=True)

    def public_key_bytes(self) -> bytes:
        """The public key, as `public_key.PublicKey` reads it; empty when the epoch has none."""
        return base64.b64decode(self.public_key or "", validate=True)

    @property
    def speaker(self) -> str:
        return self.maker


class Advert(Statement):
    """Fresh public keys of one hospital for one attempt, and a commitment to its self seed.

    age: of its contribution, in versions; 0 when it was trained on the version that the attempt builds on.
    """

    age: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    attempt: AttemptRef
    epoch: Counter
    hospital_id: Name
    mask_key: Hex32
    roster: Hex32
    seed_commitment: Hex32
    transport_key: Hex32
    type: Literal["advert"] = "advert"

    @property
    def speaker(self) -> str:
        return self.hospital_id


class Share(Statement):
    """Two sealed shares from one hospital to another, and commitments to them."""

    adverts: Hex32
    attempt: AttemptRef
    box: Annotated[str, Field(pattern=r"^[0-9a-f]{120}$")]
    mask_commitment: Hex32
    recipient: Name
    self_commitment: Hex32
    sender: Name
    type: Literal["share"] = "share"

    @property
    def speaker(self) -> str:
        return self.sender


class Upload(Statement):
    """A masked ciphertext. `complaints`: sharers whose shares for this hospital did not open or match, sorted."""

    MAX_BYTES: ClassVar[int] = 256 * 1024

    adverts: Hex32
    attempt: AttemptRef
    ciphertext_sha256: Hex32
    complaints: Complaints = ()
    hospital_id: Name
    lanes: Annotated[int, Field(ge=1, le=2)]
    parameter_set: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    segments: Annotated[tuple[Hex32, ...], Field(min_length=1, max_length=MAX_SEGMENTS)]
    sharers: Hex32
    type: Literal["upload"] = "upload"
    vector_length: Annotated[int, Field(ge=1, le=1 << 27)]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return self.require(_ascending(self.complaints), "complaints are not a sorted set")

    @property
    def speaker(self) -> str:
        return self.hospital_id


class Survivor(_Spelled):
    """A hospital whose upload counts: the SHA-256 of its `upload` statement, and the complaints in it."""

    complaints: Complaints = ()
    hospital_id: Name
    upload: Hex32


class Survivors(Statement):
    """Whose uploads count. At least t survivors sign the same bytes before anything is revealed."""

    adverts: Hex32
    attempt: AttemptRef
    epoch: Counter
    roster: Hex32
    sharers: Annotated[tuple[Name, ...], Field(min_length=2, max_length=MAX_MEMBERS)]
    survivors: Annotated[tuple[Survivor, ...], Field(min_length=2, max_length=MAX_MEMBERS)]
    type: Literal["survivors"] = "survivors"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.require(_ascending(self.sharers), "sharers are not a sorted set")
        self.require(_ascending(self.ids), "survivors are not a sorted set")
        sharers = set(self.sharers)
        for survivor in self.survivors:
            others = sharers - {survivor.hospital_id}
            fit = _ascending(survivor.complaints) and others.issuperset(survivor.complaints)
            self.require(fit, "complaints are not a sorted set of other sharers")
        return self.require(sharers.issuperset(self.ids), "a survivor is not among the sharers")

    @property
    def ids(self) -> tuple[str, ...]:
        """The survivors, sorted."""
        return tuple(survivor.hospital_id for survivor in self.survivors)

    @property
    def complaints(self) -> dict[str, tuple[str, ...]]:
        """Whose shares each survivor does not hold."""
        return {survivor.hospital_id: survivor.complaints for survivor in self.survivors}

    @property
    def dropped(self) -> tuple[str, ...]:
        """The sharers who did not upload, sorted."""
        survived = set(self.ids)
        return tuple(name for name in self.sharers if name not in survived)


class RevealedShare(_Spelled):
    """A share in the clear: of a survivor's self seed, or of a dropped sharer's mask seed."""

    kind: Literal["self", "mask"]
    of: Name
    share: Hex16


class Reveal(Statement):
    """What one survivor reveals. `of` is unique: never both secrets of one hospital."""

    attempt: AttemptRef
    sender: Name
    shares: Annotated[tuple[RevealedShare, ...], Field(min_length=1, max_length=MAX_MEMBERS)]
    survivors: Hex32
    type: Literal["reveal"] = "reveal"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return self.require(_ascending(share.of for share in self.shares), "shares are not a sorted set")

    @property
    def speaker(self) -> str:
        return self.sender


class Digest(Statement):
    """What one survivor decrypted and made of it. `digest` is keyed: the centre learns nothing from it."""

    attempt: AttemptRef
    digest: Hex32
    hospital_id: Name
    next_state_sha256: Hex32
    sum_sha256: Hex32
    survivors: Hex32
    type: Literal["digest"] = "digest"

    @property
    def speaker(self) -> str:
        return self.hospital_id


S = TypeVar("S", bound=Statement)
C = TypeVar("C", bound=Callable[..., object])


def sign(statement: Statement, keys: Signer) -> Signed:
    """Sign a statement as the hospital that it names.

    Raises: FedmeshError(STATEMENT_INVALID) when it names another.
    """
    if statement.speaker not in (None, keys.hospital_id):
        raise FedmeshError(Code.STATEMENT_INVALID, f"{keys.hospital_id} cannot sign for {statement.speaker}")
    encoded = statement.encode()
    return Signed(keys.hospital_id, encoded, sign_bytes(encoded, keys))


def sign_bytes(statement: bytes, keys: Signer) -> bytes:
    """An Ed25519 signature over the domain and the statement, 64 bytes."""
    return keys.signing.sign(SIGNATURE_DOMAIN + statement)


def parse(kind: type[S], statement: bytes) -> S:
    """Read a statement that must be canonical and of this type. It is not verified: see `open_signed`.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    if len(statement) > kind.MAX_BYTES:
        raise FedmeshError(Code.STATEMENT_INVALID, f"a statement is longer than {kind.MAX_BYTES} bytes")
    found = _choose(statement, _parse_small, _parse_large, _parse)(kind, statement)
    assert isinstance(found, kind)
    return found


def verify(statement: bytes, hospital_id: str, signature: bytes, signers: Signers) -> None:
    """Check a signature over a statement's exact bytes.

    Raises: FedmeshError(STATEMENT_INVALID) when the hospital may not sign, or did not sign this.
    """
    key = signers.signing_key(hospital_id)
    try:
        _choose(statement, _verify_small, _verify_large, _verify)(key, statement, signature)
    except (InvalidSignature, ValueError):
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"the signature is not one of {hospital_id} over this statement"
        ) from None


def open_signed(kind: type[S], signed: Signed, signers: Signers) -> S:
    """Read a statement of this type that its own speaker signed.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    verify(signed.statement, signed.hospital_id, signed.signature, signers)
    found = parse(kind, signed.statement)
    if found.speaker not in (None, signed.hospital_id):
        raise FedmeshError(Code.STATEMENT_INVALID, f"{signed.hospital_id} signed a statement of another hospital")
    return found


def adverts_digest(adverts: Iterable[Signed]) -> str:
    """What names a group and its keys: SHA-256, hex, over the sorted list of [hospital_id, SHA-256 of its advert].

    Of statements of another type, one from each hospital, it is likewise a name.
    """
    return _list_digest(sorted([advert.hospital_id, advert.sha256] for advert in adverts))


def sharers_digest(ids: Iterable[str]) -> str:
    """What names the sharers in an upload: SHA-256, hex, over the sorted list of ids."""
    return _list_digest(sorted(ids))


def _list_digest(items: list[str] | list[list[str]]) -> str:
    return hashlib.sha256(_LISTS.encode(items).encode("ascii")).hexdigest()


def _choose(statement: bytes, small: C, large: C, uncached: C) -> C:
    if len(statement) <= _SMALL_BYTES:
        return small
    return large if len(statement) <= _LARGE_BYTES else uncached


def _parse(kind: type[Statement], statement: bytes) -> Statement:
    try:
        found = kind.model_validate_json(statement)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # The wrong type, if it is that, explains everything else.
        first = min(errors, key=lambda item: item["loc"] != ("type",))
        where = ".".join(str(part) for part in first["loc"])
        name = kind.model_fields["type"].default
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"this is no {name} statement: {where[:80]}: {first['msg']}"
        ) from None
    # pydantic is several times as fast. It writes the canonical form of what was validated here: fields stand in their
    # order, and what passes the patterns is printable ASCII without escapes. Where the two differ, `encode` decides.
    if to_json(found) != statement and found.encode() != statement:
        raise FedmeshError(Code.STATEMENT_INVALID, "a statement is not in canonical form")
    return found


def _verify(key: bytes, statement: bytes, signature: bytes) -> None:
    _public_key(key).verify(signature, SIGNATURE_DOMAIN + statement)


# A statement passes several checks on its way (when it comes, when a reveal is held against it, when masks are opened);
# what was found in order once is not computed again. Failures raise and are never cached. Large ones are the uploads of
# larger models, kept for as many hospitals as a round can have; beyond that keeping them costs too much memory.
_parse_small = lru_cache(maxsize=4096)(_parse)
_parse_large = lru_cache(maxsize=MAX_MEMBERS)(_parse)
_verify_small = lru_cache(maxsize=4096)(_verify)
_verify_large = lru_cache(maxsize=MAX_MEMBERS)(_verify)


@lru_cache(maxsize=256)
def _public_key(key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(key)


def _is_base64(text: str) -> bool:
    """Whether this is the one way to write some bytes."""
    try:
        return base64.b64encode(base64.b64decode(text, validate=True)).decode("ascii") == text
    except (binascii.Error, ValueError):
        return False


def _ascending(names: Iterable[str]) -> bool:
    return all(a < b for a, b in pairwise(names))
