"""Second tries: a call that has no answer yet is made again, at another replica, within a budget (ADR 25).

A replica that is frozen or cut off takes calls and answers none; gRPC notices by a keepalive ping, up to half a minute
later. Round robin does not know either, and may give a second try to the same replica again: so after two of them the
channel connects anew, which a silent replica does not answer. Only calls that may be repeated while the first is still
under way come here.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.common.telemetry import SECOND_TRIES

WAIT_S: Final = 0.3
"""Far above what an answer takes, and below the objective's half second together with a quick second answer."""
MOST: Final = 4
_EARNED: Final = 0.1
_TOKEN_S: Final = 30.0
_FULL: Final = 4.0
_TOGETHER_S: Final = 10.0
# By then a keepalive ping has noticed it.
_AGAIN_S: Final = 30.0
# A call that others have overtaken meets a silent replica: so many others, while it waited so many times `WAIT_S`.
_OVERTAKERS: Final = 4
_OVERTAKEN_WAITS: Final = 3
# When all tries have met silence for so many times `WAIT_S`, 2.4 s, the connections are to blame: a service that waits
# for its store says so after 2 s, and new connections to it would only cost both ends a handshake.
_SURE_WAITS: Final = 8


class Budget:
    """Tokens of one channel: a call earns a tenth, a second try costs one, so one call in ten is made twice at most.

    Half a minute earns one as well: a channel with a call now and then could otherwise not pay for hours after it met a
    time in which all were slow. A second try that answers sooner than `WAIT_S` gives its token back: it went around a
    silent replica, and the others have time for it. Where all replicas are slow it does not, and the budget ends. Two
    of them within ten seconds say that a connection is silent; new connections come with a full budget.
    """

    def __init__(
        self,
        silent: Callable[[], None] = lambda: None,
        connected: Callable[[], bool] = lambda: True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """silent: told when a connection seems to be silent, at most once in `_AGAIN_S` seconds. connected: whether
        there is any: a call that waits for one meets no silent replica, and a second try would wait beside it. now: a
        clock in seconds.
        """
        self._now = now
        self._tokens, self._earned = _FULL, now()
        self._silent = silent
        self._connected = connected
        self._went_around = self._told = -math.inf
        self.quick = 0
        """Calls that were answered within `WAIT_S`, ever."""

    def earn(self) -> None:
        """For a call, and for the time since the one before."""
        before, self._earned = self._earned, self._now()
        self._tokens = min(_FULL, self._tokens + _EARNED + (self._earned - before) / _TOKEN_S)

    def went_around(self) -> None:
        """Note that a second try was answered at once while the first was not."""
        self._tokens = min(_FULL, self._tokens + 1.0)
        before, self._went_around = self._went_around, self._now()
        if self._went_around - before < _TOGETHER_S:
            self.met_silence()

    def met_silence(self) -> None:
        """Note that there is a connection without answers."""
        now = self._now()
        if now - self._told > _AGAIN_S and self._connected():
            self._told = now
            # Those who wait on the old connections may all have to go over the new ones.
            self._tokens = _FULL
            self._silent()

    def spend(self) -> bool:
        """Take a token; False when there is none, or no connection."""
        if self._tokens < 1.0 or not self._connected():
            return False
        self._tokens -= 1.0
        return True


async def first_answer(
    begin: Callable[[float], Coroutine[Any, Any, Any]], timeout_s: float, budget: Budget, wait_s: float = WAIT_S
) -> Any:
    """What a call answers, or a second try of it, whichever ends first; the other one is cancelled.

    begin: makes a try with a deadline in seconds; it raises FedmeshError. At most `MOST` second tries, one at a time:
    one that is silent too is given up for the next. An error that a repetition may mend is final when it is the last.

    Raises: FedmeshError as `begin`.
    """
    loop = asyncio.get_running_loop()
    started, quick_before = loop.time(), budget.quick
    ends = started + timeout_s
    budget.earn()
    first = loop.create_task(begin(timeout_s))
    second: asyncio.Task[Any] | None = None
    began, made = 0.0, 0
    under_way = {first}
    try:
        while True:
            looks_again = wait_s if made < MOST else None
            done, under_way = await asyncio.wait(under_way, timeout=looks_again, return_when=asyncio.FIRST_COMPLETED)
            for ended in sorted(done, key=_mendable):
                answered = not _mendable(ended)
                if answered and loop.time() - started < wait_s:
                    budget.quick += 1
                if answered and ended is second and loop.time() - began < wait_s:
                    budget.went_around()
                if _met_its_deadline(ended):
                    budget.met_silence()
                if answered or not under_way:
                    return ended.result()
            waits = (loop.time() - started) / wait_s
            overtaken = budget.quick - quick_before >= _OVERTAKERS and waits > _OVERTAKEN_WAITS
            sure, last = overtaken or waits > _SURE_WAITS, made == MOST - 1
            if not done and (overtaken or (sure and last)):
                # The last try goes over new connections.
                budget.met_silence()
            if not done and (sure or not last) and ends - loop.time() > wait_s and budget.spend():
                silent = under_way - {first}
                await _give_up(silent)
                second, began, made = loop.create_task(begin(ends - loop.time())), loop.time(), made + 1
                under_way = (under_way - silent) | {second}
                SECOND_TRIES.inc()
    finally:
        await _give_up(under_way)


def _mendable(ended: "asyncio.Task[Any]") -> bool:
    error = ended.exception()
    return isinstance(error, FedmeshError) and error.retryable


def _met_its_deadline(ended: "asyncio.Task[Any]") -> bool:
    error = ended.exception()
    return isinstance(error, FedmeshError) and error.code is Code.DEADLINE_EXCEEDED


async def _give_up(tasks: Collection["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
