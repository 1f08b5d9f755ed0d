"""Clients that begin calls and keep back the message, on one connection or many, and who make too many in too little
time: what they hold is bounded, and others are served.
"""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import enrolment_pb2, enrolment_pb2_grpc
from prometheus_client import REGISTRY

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.grpc.gate import Peer
from services.common.grpc.server import Endpoint
from services.common.grpc.strangers import StrangersConfig, StrangersServer
from services.common.grpc.wire import from_rpc_error
from tests.support.overloaded import CALLS, CALLS_OF_ONE, Setup, hold, shed

AUDIT: Final = "/fedmesh.audit.v1.AuditService/"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4


@asynccontextmanager
async def bare_channel(setup: Setup, tls: TlsConfig) -> AsyncIterator[Any]:
    """A connection of its own, without fedmesh's client, whose methods take and give bytes."""
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes())
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{setup.port}", credentials, alone) as channel:
        yield channel


async def nothing() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def withhold(channel: Any, method: str = f"{AUDIT}GetCheckpoint", timeout_s: float | None = 3600) -> Any:
    """A call that never sends its message."""
    return channel.stream_unary(method)(nothing(), timeout=timeout_s)


async def refusal(under_way: Any) -> FedmeshError:
    """What a call ends with; fails when it does not end."""
    async with asyncio.timeout(60):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await under_way
    return from_rpc_error(caught.value)


async def ended(calls: list[Any], number: int) -> list[FedmeshError]:
    """The errors of so many calls, those that end first."""
    errors = asyncio.as_completed([refusal(one) for one in calls])
    return [await next(errors) for _ in range(number)]


async def test_calls_without_their_message_are_calls_in_flight(served: Setup) -> None:
    # Fewer than what gRPC lets a connection have, so that the gate's answer comes first.
    before, opened = shed("caller"), 200
    async with bare_channel(served, served.hospital) as channel:
        calls = [withhold(channel) for _ in range(opened)]
        errors = await ended(calls, opened - CALLS_OF_ONE)
        assert {error.code for error in errors} == {Code.RATE_LIMITED}
        assert sum(not one.done() for one in calls) == CALLS_OF_ONE
        assert shed("caller") == before + opened - CALLS_OF_ONE
        await served.still_answers()
        for one in calls:
            one.cancel()
        await served.lets_in(served.hospital)


async def test_one_caller_has_no_more_on_many_connections(served: Setup) -> None:
    connections = 3 * CALLS_OF_ONE
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(bare_channel(served, served.hospital)) for _ in range(connections)]
        calls = [withhold(channel) for channel in channels]
        errors = await ended(calls, connections - CALLS_OF_ONE)
        assert {error.code for error in errors} == {Code.RATE_LIMITED}
        await served.still_answers()


async def test_callers_together_hold_no_more_than_the_server_has(served: Setup) -> None:
    before = shed("server")
    async with AsyncExitStack() as stack:
        calls = []
        for name in ("h-1", "h-2", "h-3"):
            tls = served.ca.issue_hospital(name)
            channel = await stack.enter_async_context(bare_channel(served, tls))
            calls += [withhold(channel) for _ in range(CALLS_OF_ONE)]
        errors = await ended(calls, 3 * CALLS_OF_ONE - CALLS)
        assert {error.code for error in errors} == {Code.SERVICE_UNAVAILABLE}
        assert shed("server") == before + len(errors)


@pytest.mark.parametrize("method", [f"{AUDIT}GetCheckpoint", f"{AUDIT}ListEntries", REFLECTION])
async def test_a_message_that_does_not_come_is_waited_for_no_longer(setup: Setup, method: str) -> None:
    await setup.start(message_s=0.2)
    async with bare_channel(setup, setup.ca.issue_operator("ann")) as channel:
        # Again, and some at a time: each is waited for anew.
        for number in (1, 3):
            errors = await ended([withhold(channel, method) for _ in range(number)], number)
            assert {error.code for error in errors} == {Code.INVALID_ARGUMENT}
            assert all("did not come within 0.2 s" in error.message for error in errors)


async def test_a_message_that_comes_a_byte_at_a_time_is_waited_for_no_longer(setup: Setup) -> None:
    await setup.start(message_s=1)
    reader, writer = await setup.connect()
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, headers("GetCheckpoint")))
    # A message of 1000 bytes is announced.
    writer.write(frame(DATA, 0, 1, b"\x00" + (1000).to_bytes(4, "big")))

    async def drip() -> None:
        while True:
            writer.write(frame(DATA, 0, 1, b"\x00"))
            await writer.drain()
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    await found(reader, lambda kind, flags, stream, _: stream == 1 and (kind == RST_STREAM or bool(flags & END_STREAM)))
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    writer.transport.abort()
    await setup.still_answers()


def barred(_peer: Peer) -> None:
    raise FedmeshError(Code.PERMISSION_DENIED, "h-1 is suspended")


@pytest.mark.parametrize(
    ("method", "timeout_s", "admit", "code", "text"),
    [
        ("AppendEvents", 60, None, Code.PERMISSION_DENIED, "h-1 may not call AppendEvents"),
        ("GetCheckpoint", 60, barred, Code.PERMISSION_DENIED, "h-1 is suspended"),
        ("GetCheckpoint", None, None, Code.INVALID_ARGUMENT, "no deadline"),
    ],
)
async def test_who_may_not_call_learns_it_before_the_message(
    setup: Setup, method: str, timeout_s: float | None, admit: Any, code: Code, text: str
) -> None:
    await setup.start(admit)
    async with bare_channel(setup, setup.hospital) as channel:
        error = await refusal(withhold(channel, AUDIT + method, timeout_s))
    assert error.code is code
    assert text in error.message


class Door(enrolment_pb2_grpc.EnrolmentServiceServicer):
    async def Enrol(self, _request: Any, _context: Any) -> Any:
        return enrolment_pb2.EnrolResponse()


async def test_the_door_for_strangers_counts_calls_without_their_message(setup: Setup) -> None:
    descriptor = enrolment_pb2.DESCRIPTOR.services_by_name["EnrolmentService"]
    endpoint = Endpoint(descriptor, enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server, Door())
    config = StrangersConfig(listen=f"127.0.0.1:{setup.port}", per_minute=1e-6, burst=2)
    door = StrangersServer(config, setup.ca.issue_service("registry"), endpoint, drain_s=0)
    await door.start()
    credentials = grpc.ssl_channel_credentials(setup.hospital.ca.read_bytes())
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{setup.port}", credentials) as channel:
            calls = [withhold(channel, "/fedmesh.registry.v1.EnrolmentService/Enrol") for _ in range(3)]
            [error] = await ended(calls, 1)
            assert error.code is Code.RATE_LIMITED
    finally:
        await door.stop()


async def test_a_call_that_ends_without_its_message_or_with_other_bytes_is_its_callers_fault(served: Setup) -> None:
    async def none() -> AsyncIterator[bytes]:
        for message in list[bytes]():
            yield message

    async with bare_channel(served, served.hospital) as channel:
        error = await refusal(channel.stream_unary(f"{AUDIT}GetCheckpoint")(none(), timeout=60))
        assert (error.code, error.message) == (Code.INVALID_ARGUMENT, "the call ended without its message")
        error = await refusal(channel.unary_unary(f"{AUDIT}GetInclusionProof")(b"\xff", timeout=60))
        assert error.code is Code.INVALID_ARGUMENT


async def test_a_call_cancelled_before_its_message_is_cancelled(served: Setup) -> None:
    before = {code: handled(code) for code in ("CANCELLED", "INVALID_ARGUMENT")}
    async with bare_channel(served, served.hospital) as channel:
        calls = [withhold(channel) for _ in range(CALLS_OF_ONE)]
        # One more is refused once those are there.
        while (await refusal_or_answer(served)) is not Code.RATE_LIMITED:
            pass
        for one in calls:
            one.cancel()
        await served.lets_in(served.hospital)
    async with asyncio.timeout(60):
        while handled("CANCELLED") < before["CANCELLED"] + len(calls):  # noqa: ASYNC110 - the cancellation travels
            await asyncio.sleep(0.01)
    assert handled("INVALID_ARGUMENT") == before["INVALID_ARGUMENT"]


async def refusal_or_answer(served: Setup) -> Code | None:
    async with served.channel(served.hospital) as channel:
        try:
            await call(channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint, audit_pb2.GetCheckpointRequest())
        except FedmeshError as error:
            return error.code
    return None


def handled(code: str) -> float:
    labels = {"method": f"{AUDIT}GetCheckpoint", "code": code, "objective": "yes"}
    return REGISTRY.get_sample_value("fedmesh_grpc_server_handled_total", labels) or 0.0


async def test_one_caller_begins_no_more_calls_than_its_rate(setup: Setup) -> None:
    # So slow that no token comes back during the test.
    await setup.start(calls_per_s_of_one=1e-6, burst_of_one=3)
    before = shed("rate")
    async with setup.channel(setup.hospital) as channel:
        ask = channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint
        for _ in range(3):
            await call(ask, audit_pb2.GetCheckpointRequest())
        with pytest.raises(FedmeshError, match="h-1 makes more than 1e-06 calls a second") as caught:
            await call(ask, audit_pb2.GetCheckpointRequest())
        assert caught.value.code is Code.RATE_LIMITED
        assert caught.value.retryable
        assert shed("rate") == before + 1
    await setup.still_answers()
    async with setup.channel(setup.ca.issue_service("registry")) as channel:
        ask = channel.stub(audit_pb2_grpc.AuditServiceStub).GetCheckpoint
        for _ in range(10):
            await call(ask, audit_pb2.GetCheckpointRequest())


async def test_connections_are_bounded_and_those_that_are_there_go_on(setup: Setup) -> None:
    await setup.start(connections=4)
    async with setup.channel(setup.hospital) as channel:
        held = hold(channel)
        await setup.audit.wait_for(1)
        opened = [await setup.connect() for _ in range(3)]
        for reader, writer in opened:
            writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
            await found(reader, lambda kind, *_: kind == SETTINGS)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await setup.connect()
        setup.audit.release.set()
        await held
        opened[0][1].transport.abort()
        await setup.lets_in(setup.hospital)
        for _, writer in opened:
            writer.transport.abort()


async def test_a_connection_is_told_how_many_calls_it_may_have(served: Setup) -> None:
    reader, writer = await served.connect()
    writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
    _, _, _, payload = await found(reader, lambda kind, *_: kind == SETTINGS)
    told = dict(struct.iter_unpack(">HI", payload))
    # SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113): above what the gate lets a caller have, whose answer comes first.
    assert CALLS_OF_ONE < told[3] < 1000
    writer.transport.abort()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(method: str) -> bytes:
    """The headers of a call, each literal and never indexed (RFC 7541, section 6.2.2)."""
    lines = {
        ":method": "POST",
        ":scheme": "https",
        ":path": AUDIT + method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": "1H",
    }
    return b"".join(b"\x00" + b"".join(bytes([len(part)]) + part.encode() for part in line) for line in lines.items())


async def found(
    reader: asyncio.StreamReader, wanted: Callable[[int, int, int, bytes], bool]
) -> tuple[int, int, int, bytes]:
    """The first frame that is wanted: kind, flags, stream, payload."""
    async with asyncio.timeout(60):
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if wanted(kind, flags, stream, payload):
                return kind, flags, stream, payload
