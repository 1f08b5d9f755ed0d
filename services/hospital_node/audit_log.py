"""The gRPC side of a witness: calls to the audit service."""

from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2 as pb
from fedmesh.audit.v1 import audit_pb2_grpc as rpc

from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.hospital_node.domain.witness_ports import Refusal, RefusalKind

_KINDS: Final = {
    RefusalKind.FORK: pb.ALARM_KIND_FORK,
    RefusalKind.ROLLBACK: pb.ALARM_KIND_ROLLBACK,
    RefusalKind.BAD_CHECKPOINT: pb.ALARM_KIND_BAD_CHECKPOINT,
    RefusalKind.UNPROVABLE: pb.ALARM_KIND_UNPROVABLE,
}
_REASON_LENGTH: Final = 500


class GrpcAuditLog:
    """See `domain.witness_ports.AuditLog` for the contract."""

    def __init__(self, channel: MeshChannel, timeout_s: float) -> None:
        self._stub = channel.stub(rpc.AuditServiceStub)
        self._timeout_s = timeout_s

    async def offered(self) -> str:
        return str((await self._call(self._stub.GetOfferedCheckpoint, pb.GetOfferedCheckpointRequest())).checkpoint)

    async def consistency(self, first_size: int, second_size: int) -> list[bytes]:
        request = pb.GetConsistencyProofRequest(first_size=first_size, second_size=second_size)
        return list((await self._call(self._stub.GetConsistencyProof, request)).hashes)

    async def inclusion(self, index: int, size: int) -> tuple[bytes, list[bytes]]:
        request = pb.GetInclusionProofRequest(index=index, tree_size=size)
        found = await self._call(self._stub.GetInclusionProof, request)
        return bytes(found.leaf_hash), list(found.hashes)

    async def add_cosignature(self, size: int, public_key: bytes, line: str) -> None:
        request = pb.AddCosignatureRequest(request_id=new_id(), size=size, public_key=public_key, cosignature=line)
        await self._call(self._stub.AddCosignature, request)

    async def raise_alarm(self, refusal: Refusal) -> None:
        request = pb.RaiseAlarmRequest(
            request_id=new_id(),
            kind=_KINDS[refusal.kind],
            held_checkpoint=refusal.held,
            seen_checkpoint=refusal.seen,
            reason=refusal.reason[:_REASON_LENGTH],
        )
        await self._call(self._stub.RaiseAlarm, request)

    async def _call(self, method: Any, request: Any) -> Any:
        return await call(method, request, timeout_s=self._timeout_s)
