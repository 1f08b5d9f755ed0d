"""The messages of a call, which must not be waited for without end.

gRPC reads the one message of a call before it calls a handler, and waits as long as its sender likes. Whoever is to
look at a call before that registers a handler that takes a stream of messages, and reads the one message here.
"""

# The stubs make gRPC's types generic; the classes at run time are not.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError

from services.common.errors import Code, FedmeshError

# Far above what the news of a cancelled call takes to come.
_CANCELLED_S: Final = 1.0
MessageT = TypeVar("MessageT")


class FirstMessages:
    """Waits for the first messages of calls, for each so many seconds at most. Used from one event loop.

    All who wait have one timer: under uvloop one for each took a twentieth of a small call's processor time.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        # By when they end, which is the order in which they began.
        self._waiting: dict[asyncio.Timeout, float] = {}
        self._timed = False

    async def only(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The one message of a call. Raises: FedmeshError(INVALID_ARGUMENT) when it does not come in time."""
        message = await self._in_time(context.read())
        if message is grpc.aio.EOF:
            # The end of the messages of a cancelled call comes before its cancellation, which ends this task.
            await asyncio.sleep(_CANCELLED_S)
            raise FedmeshError(Code.INVALID_ARGUMENT, "the call ended without its message")
        return message

    async def begun(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages of a stream: whoever reads them knows how long to wait for those after the first.

        Raises: FedmeshError(INVALID_ARGUMENT) when the first does not come in time.
        """
        messages = aiter(requests)
        try:
            first = await self._in_time(anext(messages))
        except StopAsyncIteration:
            return
        yield first
        async for message in messages:
            yield message

    async def _in_time(self, coming: Awaitable[MessageT]) -> MessageT:
        loop = asyncio.get_running_loop()
        timeout, ends = asyncio.timeout(None), loop.time() + self._within_s
        self._waiting[timeout] = ends
        if not self._timed:
            self._timed = True
            loop.call_at(ends, self._look, loop)
        try:
            async with timeout:
                return await coming
        except TimeoutError:
            # The caller's fault: a time-out would count against the objectives.
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"the first message of the call did not come within {self._within_s:g} s"
            ) from None
        finally:
            self._waiting.pop(timeout, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the waits that are over, and look again when the next one is."""
        while self._waiting:
            timeout, ends = next(iter(self._waiting.items()))
            if ends > loop.time():
                loop.call_at(ends, self._look, loop)
                return
            del self._waiting[timeout]
            timeout.reschedule(loop.time())
        self._timed = False


def decoding(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """The same, but bytes that are no message are their sender's fault."""
    if deserialize is None:
        return None

    def decode(content: bytes) -> Any:
        try:
            return deserialize(content)
        except DecodeError:
            raise FedmeshError(Code.INVALID_ARGUMENT, "the bytes of a message are none of this method's") from None

    return decode
