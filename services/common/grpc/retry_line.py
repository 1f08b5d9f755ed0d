"""Where the calls of one channel wait that were turned away: a few try again at a time, more with each that is served.

After an outage everybody comes at once. Each with its own pauses, hundreds of calls ask a service that cannot serve
them yet several hundred times a second, and most of what it does then is turning them away, long after its store is
back (half a minute in `make chaos`). In a line, one call at a time finds out, and the others follow as fast as they
are served: the slow start of TCP (RFC 5681), with tries for segments.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from services.common.errors import FedmeshError

_MOST: Final = 32
# Between one failure and the next try of anybody in the line: at first, and at most.
_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0
# A try that takes longer keeps nobody waiting any more. A service waits 2 s for its store before it turns a call away.
_HELD_S: Final = 2.5


class RetryLine:
    """Used from one event loop."""

    def __init__(self) -> None:
        self._most = 1
        self._trying = 0
        self._pause_s = 0.0
        self._not_before = 0.0
        self._line: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, patience_s: float) -> AsyncIterator[None]:
        """Wait in the line, at most so many seconds; the try is made within.

        Raises: what the try raises.
        """
        await self._wait(patience_s)
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._leave()

        held = asyncio.get_running_loop().call_later(_HELD_S, leave)
        try:
            yield
        except FedmeshError as error:
            self._note(served=not error.retryable)
            raise
        else:
            self._note(served=True)
        finally:
            held.cancel()
            leave()

    def _note(self, *, served: bool) -> None:
        if served:
            self._most, self._pause_s = min(_MOST, self._most + 1), 0.0
        else:
            self._most, self._pause_s = 1, min(_LONGEST_PAUSE_S, 2 * self._pause_s or _PAUSE_S)
        self._not_before = asyncio.get_running_loop().time() + self._pause_s

    async def _wait(self, patience_s: float) -> None:
        """Until it is this call's turn, which it has then taken."""
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        self._call()
        try:
            async with asyncio.timeout(patience_s):
                await place
        except TimeoutError:
            # Out of turn, for the time that is left.
            if place.cancelled():
                self._trying += 1
        except asyncio.CancelledError:
            if not place.cancelled():
                self._leave()
            raise
        finally:
            if place in self._line:
                self._line.remove(place)

    def _leave(self) -> None:
        self._trying -= 1
        self._call()

    def _call(self) -> None:
        """Let those at the head of the line go whose turn it is."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._line and self._not_before > loop.time():
            self._timer = loop.call_at(self._not_before, self._call)
            return
        while self._line and self._trying < self._most:
            place = self._line.popleft()
            if not place.done():
                self._trying += 1
                place.set_result(None)
