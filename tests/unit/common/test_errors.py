"""The error table and its way over the wire."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from services.common.errors import TABLE, Code, FedmeshError
from services.common.grpc.wire import DETAILS_KEY, from_rpc_error, to_status


def test_every_code_has_a_mapping() -> None:
    assert set(TABLE) == set(Code)


@pytest.mark.parametrize("code", list(Code))
def test_an_error_survives_the_wire(code: Code) -> None:
    status, message, trailing = to_status(FedmeshError(code, "what happened", job="j-1", left=0.25))
    received = AioRpcError(status, Metadata(), Metadata(*trailing), details=message)
    rebuilt = from_rpc_error(received)
    assert (rebuilt.code, rebuilt.message, rebuilt.detail) == (code, "what happened", {"job": "j-1", "left": "0.25"})


# CANCELLED: a server that stops cancels what it has not begun.
@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_bare_status_gets_the_code_it_means(status: grpc.StatusCode) -> None:
    received = AioRpcError(status, Metadata(), Metadata(), details="connection refused")
    assert from_rpc_error(received).code is Code.SERVICE_UNAVAILABLE
    assert from_rpc_error(received).retryable


def test_foreign_details_are_not_taken_for_ours() -> None:
    trailing = Metadata((DETAILS_KEY, b""))
    received = AioRpcError(grpc.StatusCode.DATA_LOSS, Metadata(), trailing, details="odd")
    assert from_rpc_error(received).code is Code.INTERNAL
