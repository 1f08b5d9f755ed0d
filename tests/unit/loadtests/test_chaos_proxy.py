"""The proxy between real sockets: what arrives, when, and how connections end."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from loadtests.chaos.network import Network, owners
from loadtests.chaos.proxy import WINDOW, Connection, Proxy
from loadtests.chaos.rules import Line, Rule
from services.embedded.processes import free_port


@pytest.fixture
def event_loop_policy() -> Any:
    return uvloop.EventLoopPolicy()


class Rig:
    """An echo server behind a proxy, and a client's connection to it."""

    def __init__(self) -> None:
        self.line = Line()
        self.proxy: Proxy | None = None
        self.served = 0

    def look(self, _connection: Connection, _target: str) -> Line:
        return self.line

    def change(self, line: Line) -> None:
        assert self.proxy is not None
        self.line = line
        self.proxy.refresh()

    def connection(self) -> Connection:
        assert self.proxy is not None
        (found,) = self.proxy.connections
        return found

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served += 1
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()


@asynccontextmanager
async def rig(line: Line | None = None) -> AsyncIterator[tuple[Rig, asyncio.StreamReader, asyncio.StreamWriter]]:
    made = Rig()
    made.line = line or Line()
    server = await asyncio.start_server(made.echo, "127.0.0.1", 0)
    made.proxy = Proxy("echo", server.sockets[0].getsockname(), made.look)
    host, port = await made.proxy.start("127.0.0.1")
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(20):
            yield made, reader, writer
    finally:
        writer.close()
        await made.proxy.stop()
        server.close()


async def test_what_is_sent_arrives_whole_and_in_order() -> None:
    async with rig() as (_, reader, writer):
        content = bytes(range(256)) * (3 * WINDOW // 256)
        sending = asyncio.create_task(_send(writer, content))
        assert await reader.readexactly(len(content)) == content
        await sending


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


async def test_latency_is_paid_each_way_and_keeps_order() -> None:
    async with rig(Line(delay_s=0.05)) as (_, reader, writer):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(20):
            writer.write(bytes([number]))
            await asyncio.sleep(0)
        assert await reader.readexactly(20) == bytes(range(20))
        # The loop's clock counts milliseconds.
        assert round(loop.time() - began, 3) >= 0.1


async def test_a_stalled_segment_holds_up_what_follows() -> None:
    async with rig(Line(stall_share=1.0, stall_s=0.15)) as (made, reader, writer):
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"first")
        await asyncio.sleep(0.02)
        made.line = Line()
        made.connection().line = Line()
        writer.write(b"second")
        assert await reader.readexactly(11) == b"firstsecond"
        # The loop's clock counts milliseconds.
        assert round(loop.time() - began, 3) >= 0.15


async def test_a_cut_line_is_silent_and_delivers_when_it_is_mended() -> None:
    async with rig() as (made, reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        made.change(Line(cut=True))
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)
        made.change(Line())
        assert await reader.readexactly(1) == b"b"


async def test_a_connection_begun_on_a_cut_line_reaches_the_server_only_later() -> None:
    async with rig(Line(cut=True)) as (made, reader, writer):
        writer.write(b"a")
        await asyncio.sleep(0.1)
        assert made.served == 0
        made.change(Line())
        assert await reader.readexactly(1) == b"a"


async def test_a_reset_is_one() -> None:
    async with rig() as (made, reader, writer):
        writer.write(b"a")
        await reader.readexactly(1)
        made.connection().reset()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)


async def test_half_open_is_silent_to_the_client_and_gone_for_the_server() -> None:
    async with rig() as (made, reader, writer):
        writer.write(b"a")
        await reader.readexactly(1)
        made.connection().half_open()
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(1)


async def test_the_end_of_the_stream_passes_in_both_directions() -> None:
    async with rig(Line(delay_s=0.01)) as (_, reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() == b"last words"


async def test_nobody_behind_it_is_a_reset() -> None:
    made = Rig()
    server = await asyncio.start_server(made.echo, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    server.close()
    await server.wait_closed()
    proxy = Proxy("gone", address, made.look)
    host, port = await proxy.start("127.0.0.1")
    try:
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(host, port)
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            writer.close()
    finally:
        await proxy.stop()


def test_connections_by_ipv4_and_by_mapped_addresses_have_owners() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as mapped,
        ):
            mapped.connect(("::ffff:127.0.0.1", port))
            ends = {("127.0.0.1", plain.getsockname()[1]), ("127.0.0.1", mapped.getsockname()[1])}
            found = owners([os.getpid()])
    assert {end: found.get(end) for end in ends} == dict.fromkeys(ends, os.getpid())
    assert owners([]) == {}


async def test_one_process_can_be_cut_off_and_others_are_not() -> None:
    made = Rig()
    server = await asyncio.start_server(made.echo, "127.0.0.1", 0)
    upstream = server.sockets[0].getsockname()
    port = free_port()
    network = Network()
    await network.start(
        [{"name": "echo", "host": "127.0.0.1", "port": port, "to_host": upstream[0], "to_port": upstream[1]}]
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"
            network.obey({"rules": [Rule(cut=True, sources=(os.getpid(),)).wire()]})
            writer.write(b"b")
            # A connection that begins now is found to be this process's too.
            late_reader, late_writer = await asyncio.open_connection("127.0.0.1", port)
            late_writer.write(b"c")
            for silent in (reader, late_reader):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await silent.read(1)
            network.obey({"rules": [Rule(cut=True, sources=(1,)).wire()]})
            assert await reader.readexactly(1) == b"b"
            assert await late_reader.readexactly(1) == b"c"
            assert network.obey({"act": "reset", "target": "echo"}) == {"connections": 2}
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            with pytest.raises(ValueError, match="explode"):
                network.obey({"act": "explode", "target": "echo"})
    finally:
        writer.close()
        late_writer.close()
        await network.stop()
        server.close()
