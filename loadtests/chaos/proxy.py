"""A TCP proxy that disturbs what passes: latency, stalls, silence, resets, half-open connections.

It sees bytes and not packets, so it cannot lose any: a stall of one retransmission timeout is what a lost segment looks
like from above TCP. A connection that it cuts is accepted by the kernel and then silent, where a real network would
leave the connect itself without an answer; both end by the client's own patience.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, cast

from loadtests.chaos.rules import Line

# Bytes on their way in one direction, from which on the sender is made to wait.
WINDOW: Final = 1 << 20
_RESET: Final = struct.pack("ii", 1, 0)


class _End(asyncio.Protocol):
    """One end of a connection; what it receives goes to the other end's transport, late as the line says."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.swallows = False
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._held = self._ended = self._lost = False
        self.said_end = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is of no asyncio class.
        self.transport = cast(asyncio.Transport, transport)
        self._connection.made(self)

    def data_received(self, data: bytes) -> None:
        if self.swallows:
            return
        line, loop = self._connection.line, asyncio.get_running_loop()
        connected = self.other is not None and self.other.transport is not None
        if connected and not self._waiting and not line.cut and not line.delay_s and not line.stall_share:
            self._write(data)
            return
        delay_s = line.delay_s
        if line.stall_share and self._connection.chance.random() < line.stall_share:
            delay_s += line.stall_s
        # In order: whatever comes after a stalled segment waits with it.
        due = max(loop.time() + delay_s, self._waiting[-1][0] if self._waiting else 0.0)
        self._waiting.append((due, data))
        self._size += len(data)
        if self._size > WINDOW and self.transport is not None and not self._held:
            self._held = True
            self.transport.pause_reading()
        self.flush()

    def eof_received(self) -> bool:
        self._ended = True
        self.flush()
        return True

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost = True
        self.flush()
        self._connection.lost(self)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def flush(self) -> None:
        """Hand over what is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection.line.cut or self.other is None or self.other.transport is None or self.swallows:
            return
        loop = asyncio.get_running_loop()
        while self._waiting and self._waiting[0][0] <= loop.time():
            data = self._waiting.popleft()[1]
            self._size -= len(data)
            self._write(data)
        if self._waiting:
            self._timer = loop.call_at(self._waiting[0][0], self.flush)
        elif self._lost:
            self.other.transport.close()
        elif self._ended and not self.said_end:
            self.said_end = True
            self._pass_end_on()
        if self._held and self._size <= WINDOW and self.transport is not None and not self.transport.is_closing():
            self._held = False
            self.transport.resume_reading()

    def _write(self, data: bytes) -> None:
        assert self.other is not None
        if self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def _pass_end_on(self) -> None:
        """One direction has ended; with both, so has the connection."""
        assert self.other is not None
        assert self.other.transport is not None
        assert self.transport is not None
        if self.other.said_end:
            self.other.transport.close()
            self.transport.close()
        elif not self.other.transport.is_closing():
            self.other.transport.write_eof()

    def drop(self) -> None:
        """Forget what is on its way, as a machine that dies does."""
        self._waiting.clear()
        self._size = 0

    def reset(self) -> None:
        """End with RST."""
        if self.transport is None or self.transport.is_closing():
            return
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


class Connection:
    """A client's connection and the one to the server behind it."""

    def __init__(self, proxy: "Proxy") -> None:
        self._proxy = proxy
        self.line = Line()
        self.chance = proxy.chance
        # Whose it is, as far as a rule is about that process. Kept here: a port may be another process's the next time.
        self.pid: int | None = None
        self.looked_up = False
        self.peer: tuple[str, int] = ("", 0)
        self.client, self.server = _End(self), _End(self)
        self.client.other, self.server.other = self.server, self.client
        self._connecting: asyncio.Task[None] | None = None

    def made(self, end: _End) -> None:
        assert end.transport is not None
        if end is self.server:
            self.client.flush()
            return
        self.peer = end.transport.get_extra_info("peername")[:2]
        self._proxy.joined(self)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        host, port = self._proxy.upstream
        while self.line.cut:  # noqa: ASYNC110 - rules change seldom, and a cut line has nothing better to do
            await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().create_connection(lambda: self.server, host, port)
        except (OSError, TimeoutError):
            self.client.reset()

    def lost(self, end: _End) -> None:
        if end is self.client and self._connecting is not None:
            self._connecting.cancel()
            if self.server.transport is None:
                self.server.other = None
        if all(each.transport is None or each.transport.is_closing() for each in (self.client, self.server)):
            self._proxy.left(self)

    def changed(self, line: Line) -> None:
        self.line = line
        self.client.flush()
        self.server.flush()

    def reset(self) -> None:
        for end in (self.client, self.server):
            end.drop()
            end.reset()

    def half_open(self) -> None:
        """The server's machine is gone without a word: the client's end stays, and nothing ever answers."""
        self.client.swallows = self.server.swallows = True
        self.client.drop()
        self.server.drop()
        self.server.reset()

    def drop(self) -> None:
        """Lose what is on its way, in both directions, and with it the connection."""
        self.reset()


class Proxy:
    """Listens at one address for one part. look: a connection's line, asked when it begins and when rules change."""

    def __init__(self, name: str, upstream: tuple[str, int], look: Callable[[Connection, str], Line]) -> None:
        self.name = name
        self.upstream = upstream
        self.chance = random.Random(name)  # noqa: S311 - which segments stall
        self.connections: set[Connection] = set()
        self._look = look
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int = 0) -> tuple[str, int]:
        """Listen; returns the address. Raises: OSError when it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self).client, host, port, backlog=512)
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def stop(self) -> None:
        for connection in list(self.connections):
            connection.reset()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def joined(self, connection: Connection) -> None:
        self.connections.add(connection)
        connection.line = self._look(connection, self.name)

    def left(self, connection: Connection) -> None:
        self.connections.discard(connection)

    def refresh(self) -> None:
        """Rules have changed."""
        for connection in list(self.connections):
            connection.changed(self._look(connection, self.name))
