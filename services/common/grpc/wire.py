"""FedmeshError to and from a gRPC status with google.rpc.ErrorInfo details."""

from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import DOMAIN, TABLE, Code, FedmeshError

DETAILS_KEY: Final = "grpc-status-details-bin"
INTERNAL_TEXT: Final = "internal error; the server's log has the particulars under this call's trace id"

# What a bare status (from gRPC itself or a proxy) means to the caller.
_BARE: Final[dict[grpc.StatusCode, Code]] = {
    grpc.StatusCode.UNAVAILABLE: Code.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Code.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND: Code.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT: Code.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Code.TOO_LARGE,
    # Not by the caller, who knows: a server that has no more time to drain ends the calls in it.
    grpc.StatusCode.CANCELLED: Code.SERVICE_UNAVAILABLE,
}


def to_status(error: FedmeshError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Status code, message and trailing metadata of an error."""
    status = TABLE[error.code].status
    info = error_details_pb2.ErrorInfo(reason=error.code.value, domain=DOMAIN, metadata=error.detail)
    packed = any_pb2.Any()
    packed.Pack(info)
    proto = status_pb2.Status(code=status.value[0], message=error.message, details=[packed])
    return status, error.message, ((DETAILS_KEY, proto.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError) -> FedmeshError:
    """Rebuild the error that the server raised; an unknown reason becomes the code that its bare status means."""
    info = _error_info(error.trailing_metadata())
    if info is not None and info.domain == DOMAIN and info.reason in set(Code):
        return FedmeshError(Code(info.reason), error.details() or "", **dict(info.metadata))
    code = _BARE.get(error.code(), Code.INTERNAL)
    return FedmeshError(code, error.details() or error.code().name.lower())


def _error_info(metadata: Any) -> error_details_pb2.ErrorInfo | None:
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info
    return None
