"""The chain of a hospital's privacy ledger: how the hospital writes it, and how the registry checks what it is told.

Every entry commits to all entries before it by SHA-256. The hospital signs the head that it reports with the signing
key of its roster entry: nobody else can make the registry, or later the hospital itself, believe in another ledger.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.transparency.canonical import canonical_json, parse_canonical

RESERVED: Final = "reserved"
CHARGED: Final = "charged"
RELEASED: Final = "released"
# A ledger that was lost was built again from the entries before this one: see `services.privacy.recovery`.
RECOVERED: Final = "recovered"
MAX_BODY_BYTES: Final = 4096
_ENTRY: Final = b"fedmesh privacy ledger v1\n"
_HEAD: Final = b"fedmesh privacy ledger head v1\n"
# What an entry of each kind says besides `kind` and `at`.
TERMS: Final = {
    "job_id": str,
    "plan_id": str,
    "population": str,
    "private": int,
    "epsilon": float,
    "delta": float,
    "colluders": int,
    "compositions": int,
    "metrics_compositions": int,
}
_FACTS: Final[dict[str, dict[str, type]]] = {
    RESERVED: TERMS,
    CHARGED: {"job_id": str, "round": int, "attempt": int, "measured": int},
    RELEASED: {"job_id": str},
    RECOVERED: {"basis": str, "epsilon": float, "delta": float},
}


@dataclass(frozen=True)
class Head:
    """Number and SHA-256 (hex) of the newest entry; 0 and empty before the first."""

    seq: int = 0
    sha256: str = ""

    def to_sign(self, hospital_id: str) -> bytes:
        """What a hospital signs to say that this is the newest entry of its ledger."""
        return _HEAD + canonical_json({"hospital_id": hospital_id, "seq": self.seq, "sha256": self.sha256})

    def signed_by(self, hospital_id: str, signing_key: str, signature: bytes) -> bool:
        """Whether a hospital's roster key (64 hex digits) signed this head."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing_key))
            key.verify(signature, self.to_sign(hospital_id))
        except (InvalidSignature, ValueError):
            return False
        return True

    def signer(self, hospital_id: str, signing_keys: Iterable[str], signature: bytes) -> str | None:
        """The one of a hospital's roster keys that signed this head, if any did."""
        return next((key for key in signing_keys if self.signed_by(hospital_id, key, signature)), None)


@dataclass(frozen=True)
class Entry:
    """One entry. body: canonical JSON with `kind`, `at` (UTC, ISO 8601) and the facts; sha256 commits to all before."""

    seq: int
    body: bytes
    sha256: str

    @property
    def head(self) -> Head:
        return Head(self.seq, self.sha256)

    def follows(self, before: Head) -> bool:
        return self.seq == before.seq + 1 and self.sha256 == entry_sha256(before.sha256, self.body)

    def read(self) -> dict[str, Any]:
        """What the entry says. Raises: ValueError for a body that no ledger writes."""
        if len(self.body) > MAX_BODY_BYTES:
            raise ValueError("the entry is too long")
        said = parse_canonical(self.body)
        kind, at = said.get("kind"), said.get("at")
        facts = _FACTS.get(kind) if isinstance(kind, str) else None
        if facts is None or not isinstance(at, str) or set(said) != {"kind", "at", *facts}:
            raise ValueError("the entry is of no known kind")
        if datetime.fromisoformat(at).tzinfo is None:
            raise ValueError("the entry's time has no zone")
        for name, kind_of in facts.items():
            allowed = (int, float) if kind_of is float else kind_of
            if not isinstance(said[name], allowed) or isinstance(said[name], bool):
                raise ValueError(f"{name} is not of its type")
        return said


def entry_sha256(previous: str, body: bytes) -> str:
    """SHA-256 of an entry in hex. previous: that of the entry before; empty for the first one."""
    return hashlib.sha256(_ENTRY + previous.encode("ascii") + b"\n" + body).hexdigest()


def next_entry(before: Head, kind: str, at: str, **facts: object) -> Entry:
    body = canonical_json({"kind": kind, "at": at, **facts})
    return Entry(before.seq + 1, body, entry_sha256(before.sha256, body))
