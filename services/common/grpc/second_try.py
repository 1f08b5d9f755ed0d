"""Second tries: a call that has no answer yet is made again, at another replica, within a budget (ADR 25).

A replica that is frozen or cut off takes calls and answers none; gRPC notices by a keepalive ping, up to half a minute
later. Only calls that may be repeated while the first is still under way come here.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from services.common.errors import FedmeshError
from services.common.telemetry import SECOND_TRIES

WAIT_S: Final = 0.3
"""Far above what an answer takes, and below the objective's half second together with a quick second answer."""
MOST: Final = 3
_EARNED: Final = 0.1
_FULL: Final = 3.0


class Budget:
    """Tokens of one channel: a call earns a tenth, a second try costs one, so one call in ten is made twice at most.

    A second try that answers sooner than `WAIT_S` gives its token back: it went around a silent replica, and the others
    have time for it. Where all replicas are slow it does not, and the budget ends.
    """

    def __init__(self) -> None:
        self._tokens = _FULL

    def earn(self, tokens: float = _EARNED) -> None:
        self._tokens = min(_FULL, self._tokens + tokens)

    def spend(self) -> bool:
        """Take a token; False when there is none."""
        if self._tokens < 1.0:
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
    ends = loop.time() + timeout_s
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
                if answered and ended is second and loop.time() - began < wait_s:
                    budget.earn(1.0)
                if answered or not under_way:
                    return ended.result()
            if not done and ends - loop.time() > wait_s and budget.spend():
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


async def _give_up(tasks: Collection["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
