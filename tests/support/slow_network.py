"""A TCP proxy that delivers late, as a long line does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def slow_network(target: str, delay_s: float) -> AsyncIterator[str]:
    """The address of a proxy to `target` (host:port); every byte takes `delay_s` in either direction."""
    host, _, port = target.rpartition(":")
    copying: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            while piece := await reader.read(65536):
                loop.call_later(delay_s, writer.write, piece)
        except ConnectionError:
            pass
        loop.call_later(delay_s, writer.close)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        for ends in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(carry(*ends))
            copying.add(task)
            task.add_done_callback(copying.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        host_port = server.sockets[0].getsockname()
        yield f"{host_port[0]}:{host_port[1]}"
        for task in copying:
            task.cancel()
        await asyncio.gather(*copying, return_exceptions=True)
