"""What a hospital remembers of one attempt, and how that is written down."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import Code, FedmeshError
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import AttemptRef, Signed

_VERSION = 1


@dataclass(frozen=True)
class MemberState:
    """Everything of one attempt. Secret: seeds, the transport key, the shares of others."""

    attempt: AttemptRef
    roster: str
    """SHA-256, hex."""
    epoch: int
    cohort: tuple[str, ...]
    self_seed: bytes = field(repr=False)
    mask_seed: bytes = field(repr=False)
    transport_key: bytes = field(repr=False)
    """X25519 private key, 32 bytes."""
    advert: Signed
    adverts: tuple[Signed, ...] = ()
    """The sealed group's, sorted; empty before `share`."""
    shares_out: tuple[Signed, ...] = ()
    """One for every other member of the group, sorted by recipient."""
    own_share: SharePair | None = field(default=None, repr=False)
    """What this hospital holds of its own seeds."""
    sharers: tuple[str, ...] = ()
    """Sorted; empty before `receive`."""
    received: str = ""
    """What names the statements that `receive` took: SHA-256, hex."""
    shares_in: Mapping[str, SharePair] = field(default_factory=dict, repr=False)
    """By dealer, its own included."""
    complaints: tuple[str, ...] = ()
    """Dealers whose shares did not open or match."""
    upload: Signed | None = None
    survivors: bytes = b""
    confirmation: bytes = b""
    """Signature over `survivors`, 64 bytes; empty before `confirm`."""
    reveal: Signed | None = None
    digest: Signed | None = None

    def to_json(self) -> bytes:
        """Everything, for durable storage inside the hospital."""
        value = {
            "version": _VERSION,
            "attempt": self.attempt.model_dump(),
            "roster": self.roster,
            "epoch": self.epoch,
            "cohort": self.cohort,
            "self_seed": self.self_seed.hex(),
            "mask_seed": self.mask_seed.hex(),
            "transport_key": self.transport_key.hex(),
            "advert": _plain(self.advert),
            "adverts": [_plain(signed) for signed in self.adverts],
            "shares_out": [_plain(signed) for signed in self.shares_out],
            "own_share": [share.hex() for share in self.own_share or ()],
            "sharers": self.sharers,
            "received": self.received,
            "shares_in": {name: [share.hex() for share in pair] for name, pair in self.shares_in.items()},
            "complaints": self.complaints,
            "upload": _plain(self.upload),
            "survivors": self.survivors.decode("ascii"),
            "confirmation": self.confirmation.hex(),
            "reveal": _plain(self.reveal),
            "digest": _plain(self.digest),
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> "MemberState":
        """Read what `to_json` wrote.

        Raises: FedmeshError(DATA_INVALID) when it is something else.
        """
        try:
            return _read(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FedmeshError(Code.DATA_INVALID, "the stored state of an attempt is damaged") from error


def _read(value: dict[str, Any]) -> MemberState:
    if value["version"] != _VERSION:
        raise ValueError("unknown version")
    return MemberState(
        attempt=AttemptRef.model_validate(value["attempt"]),
        roster=value["roster"],
        epoch=value["epoch"],
        cohort=tuple(value["cohort"]),
        self_seed=bytes.fromhex(value["self_seed"]),
        mask_seed=bytes.fromhex(value["mask_seed"]),
        transport_key=bytes.fromhex(value["transport_key"]),
        advert=_signed(value["advert"]),
        adverts=tuple(_signed(item) for item in value["adverts"]),
        shares_out=tuple(_signed(item) for item in value["shares_out"]),
        own_share=_pair(value["own_share"]) if value["own_share"] else None,
        sharers=tuple(value["sharers"]),
        received=value["received"],
        shares_in={name: _pair(pair) for name, pair in value["shares_in"].items()},
        complaints=tuple(value["complaints"]),
        upload=_optional(value["upload"]),
        survivors=value["survivors"].encode("ascii"),
        confirmation=bytes.fromhex(value["confirmation"]),
        reveal=_optional(value["reveal"]),
        digest=_optional(value["digest"]),
    )


def _plain(signed: Signed | None) -> list[str] | None:
    if signed is None:
        return None
    return [signed.hospital_id, signed.statement.decode("ascii"), signed.signature.hex()]


def _signed(value: list[str]) -> Signed:
    hospital_id, statement, signature = value
    return Signed(hospital_id, statement.encode("ascii"), bytes.fromhex(signature))


def _optional(value: list[str] | None) -> Signed | None:
    return None if value is None else _signed(value)


def _pair(value: list[str]) -> SharePair:
    self_share, mask_share = value
    return SharePair(bytes.fromhex(self_share), bytes.fromhex(mask_share))
