"""The one error type of fedmesh and the one table that maps its codes.

Code raises `FedmeshError(Code.X, "what happened and what to do", **detail)`. A server interceptor turns it into a
gRPC status with a `google.rpc.ErrorInfo`; the client interceptor rebuilds the same error on the other side. An
exception of any other type reaches the caller only as INTERNAL with a fixed text.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import grpc

DOMAIN: Final = "fedmesh"


class Code(StrEnum):
    """Stable slugs. They are an interface: add, never rename."""

    # bad input
    INVALID_ARGUMENT = "invalid-argument"
    PLAN_INVALID = "plan-invalid"
    DATA_INVALID = "data-invalid"
    CONFIG_INVALID = "config-invalid"
    CIPHERTEXT_INVALID = "ciphertext-invalid"
    CHUNK_STREAM_INVALID = "chunk-stream-invalid"
    PROOF_INVALID = "proof-invalid"
    STATEMENT_INVALID = "statement-invalid"
    # identity
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission-denied"
    # existence and state
    NOT_FOUND = "not-found"
    ALREADY_EXISTS = "already-exists"
    WRONG_STATE = "wrong-state"
    ALREADY_CONTRIBUTED = "already-contributed"
    PRIVACY_REFUSED = "privacy-refused"
    LOST_RACE = "lost-race"
    REQUEST_ID_REUSED = "request-id-reused"
    EQUIVOCATION = "equivocation"
    # capacity and dependencies
    BUDGET_EXHAUSTED = "budget-exhausted"
    RATE_LIMITED = "rate-limited"
    TOO_LARGE = "too-large"
    STORE_UNAVAILABLE = "store-unavailable"
    STORE_FULL = "store-full"
    SERVICE_UNAVAILABLE = "service-unavailable"
    DEADLINE_EXCEEDED = "deadline-exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Mapping:
    """How a code travels: its gRPC status, and whether the same call may succeed when repeated."""

    status: grpc.StatusCode
    retryable: bool = False


TABLE: Final[dict[Code, Mapping]] = {
    Code.INVALID_ARGUMENT: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.PLAN_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.DATA_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.CONFIG_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.CIPHERTEXT_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.CHUNK_STREAM_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.PROOF_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.STATEMENT_INVALID: Mapping(grpc.StatusCode.INVALID_ARGUMENT),
    Code.UNAUTHENTICATED: Mapping(grpc.StatusCode.UNAUTHENTICATED),
    Code.PERMISSION_DENIED: Mapping(grpc.StatusCode.PERMISSION_DENIED),
    Code.NOT_FOUND: Mapping(grpc.StatusCode.NOT_FOUND),
    Code.ALREADY_EXISTS: Mapping(grpc.StatusCode.ALREADY_EXISTS),
    Code.WRONG_STATE: Mapping(grpc.StatusCode.FAILED_PRECONDITION),
    Code.ALREADY_CONTRIBUTED: Mapping(grpc.StatusCode.FAILED_PRECONDITION),
    Code.PRIVACY_REFUSED: Mapping(grpc.StatusCode.FAILED_PRECONDITION),
    Code.LOST_RACE: Mapping(grpc.StatusCode.ABORTED, retryable=True),
    Code.REQUEST_ID_REUSED: Mapping(grpc.StatusCode.ALREADY_EXISTS),
    Code.EQUIVOCATION: Mapping(grpc.StatusCode.FAILED_PRECONDITION),
    Code.BUDGET_EXHAUSTED: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED),
    Code.RATE_LIMITED: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, retryable=True),
    Code.TOO_LARGE: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED),
    Code.STORE_UNAVAILABLE: Mapping(grpc.StatusCode.UNAVAILABLE, retryable=True),
    Code.STORE_FULL: Mapping(grpc.StatusCode.UNAVAILABLE, retryable=True),
    Code.SERVICE_UNAVAILABLE: Mapping(grpc.StatusCode.UNAVAILABLE, retryable=True),
    Code.DEADLINE_EXCEEDED: Mapping(grpc.StatusCode.DEADLINE_EXCEEDED, retryable=True),
    Code.CANCELLED: Mapping(grpc.StatusCode.CANCELLED),
    Code.INTERNAL: Mapping(grpc.StatusCode.INTERNAL),
}


class FedmeshError(Exception):
    """An error that a caller may see.

    `message` is public: it says what happened and what to do, and holds no patient data, key or path of a server.
    `detail` holds short public facts (strings), sent as ErrorInfo metadata.
    """

    def __init__(self, code: Code, message: str, **detail: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = {key: str(value) for key, value in detail.items()}

    @property
    def retryable(self) -> bool:
        return TABLE[self.code].retryable

    def __str__(self) -> str:
        return f"{self.message} [{self.code.value}]"
