"""Invitations, reinstatements and removals: proposed by one person, approved by another."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.registry.domain.enrolment import Invitation, require_valid_for
from services.registry.domain.entities import Event, Hospital, HospitalStatus
from services.registry.domain.events import event
from services.registry.domain.membership import (
    OPEN_FOR,
    ChangeKind,
    MembershipChange,
    require_approvable,
    require_possible,
)
from services.registry.usecases.hospitals import change_standing, find_hospital
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction

_STANDING: Final = {ChangeKind.REINSTATE: HospitalStatus.ACTIVE, ChangeKind.REMOVE: HospitalStatus.REMOVED}


class MembershipUseCases:
    """enrols: whether this registry issues certificates; without, nobody can be invited."""

    def __init__(self, store: Store, mutations: Mutations, clock: Clock, *, enrols: bool) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._enrols = enrols

    async def propose(
        self,
        command: Command[MembershipChange],
        kind: ChangeKind,
        hospital_id: str,
        reason: str,
        token: tuple[str, timedelta] | None,
    ) -> bytes:
        """Propose a change; the request's id becomes the change's.

        token: of an invitation, its SHA-256 and for how long it may be used once the change is approved.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) for what the hospital's standing does not allow or where the
            registry issues no certificates, (ALREADY_EXISTS) for a token that was used in another invitation,
            (INVALID_ARGUMENT) for a time out of range.
        """
        if kind is ChangeKind.INVITE and not self._enrols:
            raise FedmeshError(
                Code.WRONG_STATE, "this registry issues no certificates: its configuration has no section `enrolment`"
            )
        token_sha256, valid = token or (None, None)
        if valid is not None:
            require_valid_for(valid)

        async def body(tx: Transaction) -> MembershipChange:
            require_possible(kind, await find_hospital(tx, hospital_id))
            if token_sha256 is not None:
                await _require_new(tx, token_sha256)
            now = self._clock.now()
            change = MembershipChange(
                command.request_id,
                kind,
                hospital_id,
                reason,
                str(command.caller),
                now,
                now + OPEN_FOR,
                token_sha256,
                valid,
            )
            await tx.membership.add(change)
            await tx.outbox.add([_told("membership.proposed", now, command.caller, change)])
            return change

        return await self._mutations.run(command, body)

    async def approve(self, command: Command[MembershipChange], change_id: UUID) -> bytes:
        """Approve a change as another person than its proposer; it takes effect in the same transaction.

        Raises: FedmeshError(NOT_FOUND), (PERMISSION_DENIED | WRONG_STATE) as `require_approvable`.
        """

        async def body(tx: Transaction) -> MembershipChange:
            change = await tx.membership.get(change_id)
            if change is None:
                raise FedmeshError(Code.NOT_FOUND, f"there is no change of membership {change_id}")
            hospital = await find_hospital(tx, change.hospital_id)
            now = self._clock.now()
            require_approvable(change, hospital, str(command.caller), now)
            approved = replace(change, approved_by=str(command.caller), approved_at=now)
            await tx.membership.approve(approved)
            await tx.outbox.add([_told("membership.approved", now, command.caller, approved)])
            await _carry_out(tx, command.caller, hospital, approved, now)
            return approved

        return await self._mutations.run(command, body)

    async def list(self, caller: Identity) -> tuple[MembershipChange, ...]:
        return await self._store.ask("ListMembershipChanges", caller, lambda tx: tx.membership.list())


async def _require_new(tx: Transaction, token_sha256: str) -> None:
    if await tx.membership.has_token(token_sha256) or await tx.credentials.invitation(token_sha256) is not None:
        raise FedmeshError(Code.ALREADY_EXISTS, "there is an invitation with this token: make a new token")


async def _carry_out(
    tx: Transaction, caller: Identity, hospital: Hospital, change: MembershipChange, now: datetime
) -> None:
    if change.kind is not ChangeKind.INVITE:
        await change_standing(tx, caller, hospital, _STANDING[change.kind], change.reason, now)
        return
    assert change.token_sha256 is not None
    assert change.token_expires_at is not None
    made = Invitation(change.token_sha256, change.hospital_id, str(caller), now, change.token_expires_at)
    # An open invitation of before is withdrawn.
    await tx.credentials.invite(made)
    facts = {"token_sha256": made.token_sha256, "expires_at": made.expires_at.isoformat(timespec="seconds")}
    await tx.outbox.add([event("hospital.invited", now, caller, f"hospital/{change.hospital_id}", **facts)])


def _told(kind: str, at: datetime, caller: Identity, change: MembershipChange) -> Event:
    facts: dict[str, Any] = {
        "change_id": str(change.change_id),
        "change": change.kind.value,
        "reason": change.reason,
        "proposed_by": change.proposed_by,
    }
    if change.token_sha256 is not None:
        facts["token_sha256"] = change.token_sha256
    return event(kind, at, caller, f"hospital/{change.hospital_id}", **facts)
