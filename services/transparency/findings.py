"""What a hospital found of a model version, as it signs it: the results of the checks that only hospitals can make.

A report is canonical JSON, signed by the hospital's roster key (Ed25519) over a prefix of its own. What is in it was
computed from the opened secure sum, which every hospital that opened it has alike: it reveals nothing of the one that
signs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.errors import Code, FedmeshError
from services.transparency.canonical import canonical_json, parse_canonical

MAX_BYTES: Final = 16 * 1024
HOSPITAL_CHECKS: Final = ("saturation", "membership-inference", "subgroups")
"""The checks that hospitals make. The order is that in which they are shown."""
_CONTEXT: Final = b"fedmesh model checks v1\n"
_TYPE: Final = "model checks"


@dataclass(frozen=True)
class Finding:
    """One check's result. figures: the numbers that it rests on, finite."""

    check: str
    passed: bool
    reason: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Findings:
    """What one hospital found of version `version` of a job, whose sealed state has this SHA-256."""

    hospital_id: str
    job_id: str
    version: int
    state_sha256: str
    findings: tuple[Finding, ...]

    def to_bytes(self) -> bytes:
        """Raises: ValueError when a figure is not finite."""
        results = {
            item.check: {"figures": dict(item.figures), "passed": item.passed, "reason": item.reason}
            for item in self.findings
        }
        return canonical_json(
            {
                "hospital_id": self.hospital_id,
                "job_id": self.job_id,
                "results": results,
                "state_sha256": self.state_sha256,
                "type": _TYPE,
                "version": self.version,
            }
        )

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        return key.sign(_CONTEXT + self.to_bytes())


def open_findings(statement: bytes, signature: bytes, public: bytes) -> Findings:
    """A report, once the signature over it is checked. public: the hospital's Ed25519 key in the roster, 32 bytes.

    Raises: FedmeshError(STATEMENT_INVALID).
    """
    found = _read(statement)
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _CONTEXT + statement)
    except (InvalidSignature, ValueError):
        raise _invalid(f"the report is not signed by {found.hospital_id}'s key in the job's roster") from None
    return found


def _read(statement: bytes) -> Findings:
    try:
        value = parse_canonical(statement) if len(statement) <= MAX_BYTES else {}
        if value.pop("type") != _TYPE:
            raise ValueError("another type")
        findings = tuple(_finding(check, said) for check, said in value.pop("results").items())
        version = value.pop("version")
        names = [str(value.pop(name)) for name in ("hospital_id", "job_id", "state_sha256")]
        if value or type(version) is not int or not {item.check for item in findings} <= set(HOSPITAL_CHECKS):
            raise ValueError("unknown content")
        return Findings(names[0], names[1], version, names[2], findings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid("the report is no report of model checks in canonical form") from error


def _finding(check: str, said: dict[str, Any]) -> Finding:
    figures = {str(key): float(value) for key, value in said["figures"].items()}
    if said.keys() != {"figures", "passed", "reason"} or type(said["passed"]) is not bool:
        raise ValueError("unknown content")
    if len(said["reason"]) > 500 or not said["reason"].isprintable() or not all(map(math.isfinite, figures.values())):
        raise ValueError("unusable content")
    return Finding(check, said["passed"], said["reason"], figures)


def _invalid(message: str) -> FedmeshError:
    return FedmeshError(Code.STATEMENT_INVALID, message)
