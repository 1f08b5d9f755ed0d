"""The gRPC surface of changes of membership: checks the form of requests, calls a use case, words the answer."""

from datetime import timedelta
from typing import Any, Final

from fedmesh.registry.v1 import membership_pb2 as pb
from fedmesh.registry.v1 import membership_pb2_grpc as rpc

from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.ids import require_name, require_sha256, require_uuid
from services.registry import wire
from services.registry.domain.membership import ChangeKind, MembershipChange
from services.registry.usecases.membership import MembershipUseCases
from services.registry.usecases.ports import Command

_KINDS: Final = {
    pb.MEMBERSHIP_CHANGE_KIND_INVITE: ChangeKind.INVITE,
    pb.MEMBERSHIP_CHANGE_KIND_REINSTATE: ChangeKind.REINSTATE,
    pb.MEMBERSHIP_CHANGE_KIND_REMOVE: ChangeKind.REMOVE,
}
_WIRE_KINDS: Final = {kind: number for number, kind in _KINDS.items()}


class MembershipServicer(rpc.MembershipServiceServicer):
    """Access is decided before, by the policy beside each method; that two people decide, by the use case."""

    def __init__(self, usecases: MembershipUseCases) -> None:
        self._usecases = usecases

    async def ProposeMembershipChange(
        self, request: pb.ProposeMembershipChangeRequest, _context: Any
    ) -> pb.ProposeMembershipChangeResponse:
        command: Command[MembershipChange] = wire.command(
            request,
            caller(),
            "ProposeMembershipChange",
            lambda change: pb.ProposeMembershipChangeResponse(change=_wired(change)),
        )
        kind = wire.require_choice(request.kind, _KINDS, "kind")
        name = require_name(request.hospital_id, "hospital_id")
        reason = wire.require_text(request.reason, "reason", 500)
        answer = await self._usecases.propose(command, kind, name, reason, _token(request, kind))
        return pb.ProposeMembershipChangeResponse.FromString(answer)

    async def ApproveMembershipChange(
        self, request: pb.ApproveMembershipChangeRequest, _context: Any
    ) -> pb.ApproveMembershipChangeResponse:
        command: Command[MembershipChange] = wire.command(
            request,
            caller(),
            "ApproveMembershipChange",
            lambda change: pb.ApproveMembershipChangeResponse(change=_wired(change)),
        )
        change_id = require_uuid(request.change_id, "change_id")
        return pb.ApproveMembershipChangeResponse.FromString(await self._usecases.approve(command, change_id))

    async def ListMembershipChanges(
        self, _request: pb.ListMembershipChangesRequest, _context: Any
    ) -> pb.ListMembershipChangesResponse:
        return pb.ListMembershipChangesResponse(changes=map(_wired, await self._usecases.list(caller())))


def _token(request: pb.ProposeMembershipChangeRequest, kind: ChangeKind) -> tuple[str, timedelta] | None:
    """Raises: FedmeshError(INVALID_ARGUMENT) for an invitation without a token, and for a token of anything else."""
    if kind is ChangeKind.INVITE:
        return require_sha256(request.token_sha256, "token_sha256"), timedelta(seconds=request.valid_s)
    if request.token_sha256 or request.valid_s:
        raise FedmeshError(Code.INVALID_ARGUMENT, "token_sha256 and valid_s are for invitations only")
    return None


def _wired(change: MembershipChange) -> pb.MembershipChange:
    return pb.MembershipChange(
        change_id=str(change.change_id),
        kind=_WIRE_KINDS[change.kind],
        hospital_id=change.hospital_id,
        reason=change.reason,
        proposed_by=change.proposed_by,
        proposed_at=wire.timestamp(change.proposed_at),
        expires_at=wire.timestamp(change.expires_at),
        approved_by=change.approved_by or "",
        approved_at=wire.timestamp(change.approved_at),
        token_expires_at=wire.timestamp(change.token_expires_at),
        valid_s=0 if change.valid is None else int(change.valid.total_seconds()),
        overtaken=change.overtaken,
    )
