"""A budget above the default, as two people of the hospital approved it.

An approval is a file: what is approved, and signatures over its canonical JSON. It counts when at least two different
people signed it, each with a key that the hospital's configuration lists. The file is local; nothing of it is sent.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.config import read_secret
from services.common.errors import Code, FedmeshError
from services.privacy.budget import DEFAULT_LIMIT, Limit
from services.transparency.canonical import canonical_json, parse_json

NEEDED: Final = 2
_CONTEXT: Final = b"fedmesh privacy budget v1\n"
_TYPE: Final = "privacy budget"
_KEY_TYPE: Final = "fedmesh approver key v1"


class Approvable(Protocol):
    """What two people sign. Its text says what is approved."""

    def to_bytes(self) -> bytes:
        """Canonical JSON with a type of its own: a signature under one kind of approval is none under another."""
        ...


ApprovableT = TypeVar("ApprovableT", bound=Approvable)


@dataclass(frozen=True)
class Approval:
    """What is approved: `epsilon_limit` and `delta_limit` of a population in any 365 days."""

    hospital_id: str
    population: str
    epsilon_limit: float
    delta_limit: float

    def to_bytes(self) -> bytes:
        return canonical_json({"type": _TYPE, **asdict(self)})

    def covers(self, limit: Limit) -> bool:
        return limit.epsilon <= self.epsilon_limit and limit.delta <= self.delta_limit

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon_limit:g} and delta {self.delta_limit:g} in 365 days of population "
            f"{self.population} at {self.hospital_id}"
        )


@dataclass(frozen=True)
class ApproverKey:
    """A person's private key."""

    name: str
    key: Ed25519PrivateKey

    @property
    def public(self) -> str:
        """64 hex digits, for `privacy.approvers` in the node's configuration."""
        return self.key.public_key().public_bytes_raw().hex()

    def sign(self, approval: Approvable) -> str:
        return self.key.sign(_CONTEXT + approval.to_bytes()).hex()

    def save(self, path: Path) -> None:
        """Write a new file of mode 0600. Raises: FedmeshError(CONFIG_INVALID) when it exists or cannot be written."""
        document = {"type": _KEY_TYPE, "name": self.name, "key": self.key.private_bytes_raw().hex()}
        try:
            with open(path, "xb", opener=_private) as file:
                file.write(canonical_json(document) + b"\n")
        except OSError as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot write the key {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "ApproverKey":
        """Raises: FedmeshError(CONFIG_INVALID) for a file that is missing, open to other users, or something else."""
        try:
            document = parse_json(read_secret(path))
            if document["type"] != _KEY_TYPE:
                raise ValueError("another type")
            return cls(str(document["name"]), Ed25519PrivateKey.from_private_bytes(bytes.fromhex(document["key"])))
        except (ValueError, KeyError, TypeError) as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"{path} is no key of `fedmesh privacy keygen`") from error


def add_signature(
    path: Path, approval: ApprovableT, key: ApproverKey, read: Callable[[Path], tuple[ApprovableT, dict[str, str]]]
) -> tuple[str, ...]:
    """Sign an approval into its file, which is made if there is none; the names that have signed now.

    read: reads such a file.

    Raises: FedmeshError(INVALID_ARGUMENT) when the file approves something else or cannot be written.
    """
    signatures: dict[str, str] = {}
    if path.exists():
        found, signatures = read(path)
        if found != approval:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"{path} approves something else: {found}")
    signatures[key.name] = key.sign(approval)
    document = {"approval": json.loads(approval.to_bytes()), "signatures": dict(sorted(signatures.items()))}
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error
    return tuple(signatures)


def read_approval(path: Path) -> tuple[Approval, dict[str, str]]:
    """An approval and its signatures (hex) by name, not yet verified. Raises: FedmeshError(CONFIG_INVALID)."""
    return read_signed(path, _TYPE, _approval, "fedmesh privacy approve")


def _approval(said: dict[str, Any]) -> Approval:
    epsilon, delta = float(said.pop("epsilon_limit")), float(said.pop("delta_limit"))
    return Approval(str(said.pop("hospital_id")), str(said.pop("population")), epsilon, delta)


def read_signed(
    path: Path, of_type: str, make: Callable[[dict[str, Any]], ApprovableT], command: str
) -> tuple[ApprovableT, dict[str, str]]:
    """What a file approves and its signatures (hex) by name, not yet verified.

    make: takes its fields out of the dictionary. command: what writes such files.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    try:
        document = parse_json(path.read_bytes())
        said: dict[str, Any] = dict(document["approval"])
        if said.pop("type") != of_type:
            raise ValueError("another type")
        approval = make(said)
        if said:
            raise ValueError("unknown fields")
        return approval, {str(name): str(value) for name, value in document["signatures"].items()}
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read the approval {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} is no approval of `{command}`") from error


def require_approved(
    limit: Limit, hospital_id: str, population: str, path: Path | None, approvers: Mapping[str, str]
) -> None:
    """Check that a limit is within the default, or approved by two people.

    approvers: public keys (hex) by name, as the hospital's configuration lists them.

    Raises: FedmeshError(CONFIG_INVALID) saying what is missing.
    """
    if limit.epsilon <= DEFAULT_LIMIT.epsilon and limit.delta <= DEFAULT_LIMIT.delta:
        return
    above = (
        f"a budget of epsilon {limit.epsilon:g} and delta {limit.delta:g} is above the default of"
        f" {DEFAULT_LIMIT.epsilon:g} and {DEFAULT_LIMIT.delta:g}"
    )
    if path is None:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"{above}: it needs privacy.approval, a file of `fedmesh privacy approve` that {NEEDED} of"
            " privacy.approvers signed",
        )
    approval, signatures = read_approval(path)
    if (approval.hospital_id, approval.population) != (hospital_id, population) or not approval.covers(limit):
        raise FedmeshError(Code.CONFIG_INVALID, f"{above}, and {path} approves something else: {approval}")
    require_signers(approval, signatures, approvers, above, path)


def require_signers(
    approval: Approvable, signatures: Mapping[str, str], approvers: Mapping[str, str], what: str, path: Path
) -> None:
    """Check that two different people signed. what, path: what needs them and where they sign, for people.

    Raises: FedmeshError(CONFIG_INVALID) saying who is missing.
    """
    # Two names with one key are one person.
    signers = {approvers[name]: name for name in signatures if _verifies(approval, signatures[name], approvers, name)}
    if len(signers) < NEEDED:
        valid = f"valid are: {', '.join(sorted(signers.values()))}" if signers else "no signature in it is valid"
        raise FedmeshError(Code.CONFIG_INVALID, f"{what}: {NEEDED} of privacy.approvers must sign {path}; {valid}")


def _verifies(approval: Approvable, signature: str, approvers: Mapping[str, str], name: str) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(approvers[name]))
        key.verify(bytes.fromhex(signature), _CONTEXT + approval.to_bytes())
    except (InvalidSignature, KeyError, ValueError):
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
