"""What counts as spent when a hospital's ledger was lost and is built again from what it had reported.

Everything that was reported counts in full from the recovery on. What was spent and not reported is not known: it
counts as everything that there is, whatever the population's limit is or becomes, unless there is evidence.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.privacy.approval import read_signed, require_signers
from services.privacy.chain import Head
from services.transparency.canonical import canonical_json

_TYPE: Final = "privacy ledger recovery"
# No limit may be higher: nothing is left of any for 365 days.
MOST_EPSILON: Final = 100.0
MOST_DELTA: Final = 1.0


class Basis(StrEnum):
    """How it is known what was spent and not reported."""

    KEPT_HEAD = "kept-head"
    """The ledger's second file survived and names the newest reported entry: nothing."""
    APPROVED = "approved"
    """Two people of the hospital said how much at most."""
    ALL_SPENT = "all-spent"
    """It is not known: everything."""


@dataclass(frozen=True)
class Recovery:
    """epsilon, delta: what may have been spent beyond what was reported."""

    basis: Basis
    epsilon: float
    delta: float


ALL_SPENT: Final = Recovery(Basis.ALL_SPENT, MOST_EPSILON, MOST_DELTA)
NOTHING_UNREPORTED: Final = Recovery(Basis.KEPT_HEAD, 0.0, 0.0)


@dataclass(frozen=True)
class RecoveryApproval:
    """Two people's word that a hospital spent at most so much after the newest entry that it reported.

    seq, sha256: of that entry, so that the approval is good for one recovery.
    """

    hospital_id: str
    seq: int
    sha256: str
    epsilon: float
    delta: float

    def to_bytes(self) -> bytes:
        return canonical_json({"type": _TYPE, **asdict(self)})

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:g} and delta {self.delta:g} at most were spent at {self.hospital_id} after entry "
            f"{self.seq} ({self.sha256[:16]}) of its ledger"
        )


def read_recovery_approval(path: Path) -> tuple[RecoveryApproval, dict[str, str]]:
    """An approval and its signatures (hex) by name, not yet verified. Raises: FedmeshError(CONFIG_INVALID)."""
    return read_signed(path, _TYPE, _recovery_approval, "fedmesh privacy approve-recovery")


def _recovery_approval(said: dict[str, Any]) -> RecoveryApproval:
    epsilon, delta = float(said.pop("epsilon")), float(said.pop("delta"))
    seq, sha256 = int(said.pop("seq")), str(said.pop("sha256"))
    if not (0 <= epsilon <= MOST_EPSILON and 0 <= delta <= MOST_DELTA):
        raise ValueError("an amount out of range")
    return RecoveryApproval(str(said.pop("hospital_id")), seq, sha256, epsilon, delta)


def approved_recovery(path: Path, hospital_id: str, head: Head, approvers: Mapping[str, str]) -> Recovery:
    """What two people approved for the recovery from a head.

    Raises: FedmeshError(CONFIG_INVALID) for another hospital or head, or fewer signers.
    """
    approval, signatures = read_recovery_approval(path)
    if (approval.hospital_id, approval.seq, approval.sha256) != (hospital_id, head.seq, head.sha256):
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"{path} approves something else: {approval}; the registry's copy ends with entry {head.seq}"
            f" ({head.sha256[:16]})",
        )
    require_signers(approval, signatures, approvers, "a recovery that does not count everything as spent", path)
    return Recovery(Basis.APPROVED, approval.epsilon, approval.delta)
