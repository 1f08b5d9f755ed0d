"""Changes of membership that take two people, and when an approval still counts."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final
from uuid import UUID

from services.common.errors import Code, FedmeshError
from services.registry.domain.entities import Hospital, HospitalStatus

OPEN_FOR: Final = timedelta(days=7)


class ChangeKind(StrEnum):
    INVITE = "invite"
    REINSTATE = "reinstate"
    REMOVE = "remove"


@dataclass(frozen=True)
class MembershipChange:
    """A proposal, approved or not. token_sha256, valid: of an invitation; valid counts from the approval.

    overtaken: the hospital's standing was decided anew since, so that it cannot be approved any more.
    """

    change_id: UUID
    kind: ChangeKind
    hospital_id: str
    reason: str
    proposed_by: str
    proposed_at: datetime
    expires_at: datetime
    token_sha256: str | None = None
    valid: timedelta | None = None
    approved_by: str | None = None
    approved_at: datetime | None = None
    overtaken: bool = False

    @property
    def token_expires_at(self) -> datetime | None:
        """When the token of an approved invitation ends."""
        return None if self.valid is None or self.approved_at is None else self.approved_at + self.valid


def require_approvable(change: MembershipChange, hospital: Hospital, approver: str, now: datetime) -> None:
    """What somebody decided about a hospital counts only for the standing that they saw, and not for ever.

    Raises: FedmeshError(PERMISSION_DENIED) for its proposer, (WRONG_STATE) for a change that is approved already,
        is too old, or was proposed before the hospital's standing was decided anew; as `require_possible`.
    """
    if change.proposed_by == approver:
        raise FedmeshError(
            Code.PERMISSION_DENIED, "a change of membership must be approved by another operator than its proposer"
        )
    if change.approved_by is not None:
        raise FedmeshError(Code.WRONG_STATE, f"change {change.change_id} is approved already")
    if now >= change.expires_at:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"change {change.change_id} could be approved until {change.expires_at:%Y-%m-%d %H:%M} UTC:"
            " propose it anew",
        )
    if change.overtaken:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the standing of {hospital.hospital_id} was decided anew after this was proposed (it is"
            f" {hospital.status.value}): propose it anew",
        )
    require_possible(change.kind, hospital)


def require_possible(kind: ChangeKind, hospital: Hospital) -> None:
    """Raises: FedmeshError(WRONG_STATE) for what a hospital's standing does not allow."""
    if hospital.status is HospitalStatus.REMOVED:
        raise FedmeshError(
            Code.WRONG_STATE, f"hospital {hospital.hospital_id} was removed for good: register it under a new id"
        )
    if kind is ChangeKind.INVITE and hospital.status is not HospitalStatus.ACTIVE:
        raise FedmeshError(
            Code.WRONG_STATE, f"hospital {hospital.hospital_id} is {hospital.status.value}: reinstate it first"
        )
