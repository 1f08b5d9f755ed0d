"""Clients that connect and do not speak, or a byte at a time, that open streams without end, that send too much."""

import asyncio
from typing import Any

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.common.errors import Code, FedmeshError
from tests.support.overloaded import CALLS, CALLS_OF_ONE, METADATA_BYTES, Setup, hold, shed


async def closed(reader: asyncio.StreamReader) -> None:
    """Read until the server hangs up; fails when it does not."""
    async with asyncio.timeout(30):
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            return


async def test_a_connection_that_says_nothing_is_hung_up_on(served: Setup) -> None:
    opened = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(50)]
    await served.still_answers()
    await asyncio.gather(*(closed(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.close()


async def test_a_byte_now_and_then_does_not_keep_a_handshake_open(served: Setup) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)

    async def drip() -> None:
        # The beginning of a TLS record that announces more than ever comes.
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(1000):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    await closed(reader)
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    writer.close()


async def test_tls_without_http2_after_it_is_hung_up_on(served: Setup) -> None:
    reader, writer = await served.connect()
    await closed(reader)
    writer.close()


async def test_one_caller_cannot_fill_the_server(served: Setup) -> None:
    before = shed("caller")
    async with served.channel(served.hospital) as channel:
        held = [hold(channel) for _ in range(CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS_OF_ONE)
        with pytest.raises(FedmeshError, match="4 calls of h-1 are in flight") as caught:
            await hold(channel)
        assert caught.value.code is Code.RATE_LIMITED
        assert shed("caller") == before + 1
        await served.still_answers()
        served.audit.release.set()
        await asyncio.gather(*held)
        # What has ended counts no longer.
        await hold(channel)


async def test_a_full_server_says_so_and_recovers(served: Setup) -> None:
    before = shed("server")
    async with served.channel(served.hospital) as one, served.channel(served.ca.issue_hospital("h-2")) as two:
        held = [hold(one) for _ in range(CALLS_OF_ONE)] + [hold(two) for _ in range(CALLS - CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS)
        with pytest.raises(FedmeshError, match="too many calls are in flight here") as caught:
            await served.still_answers()
        assert caught.value.code is Code.SERVICE_UNAVAILABLE
        assert caught.value.retryable
        assert shed("server") > before
        served.audit.release.set()
        await asyncio.gather(*held)
        await served.still_answers()


async def test_a_cancelled_call_makes_room(served: Setup) -> None:
    async with served.channel(served.hospital) as channel:
        held = [hold(channel) for _ in range(CALLS_OF_ONE)]
        await served.audit.wait_for(CALLS_OF_ONE)
        held[0].cancel()
        await asyncio.gather(held[0], return_exceptions=True)
        async with asyncio.timeout(30):
            while served.audit.at_once == CALLS_OF_ONE:  # noqa: ASYNC110 - the cancellation travels
                await asyncio.sleep(0.01)
        held[0] = hold(channel)
        await served.audit.wait_for(1)
        served.audit.release.set()
        await asyncio.gather(*held)


async def test_metadata_over_the_limit_never_reaches_a_handler(served: Setup) -> None:
    tls = served.hospital
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{served.port}", credentials) as channel:
        ask: Any = audit_pb2_grpc.AuditServiceStub(channel).GetCheckpoint
        request = audit_pb2.GetCheckpointRequest()
        await ask(request, timeout=20, metadata=(("x-fits", "a" * (METADATA_BYTES // 2)),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(request, timeout=20, metadata=(("x-too-much", "a" * METADATA_BYTES),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await served.still_answers()
