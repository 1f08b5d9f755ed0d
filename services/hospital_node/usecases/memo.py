"""Results that are worth waiting for even when whoever asked first has gone."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Remembers the result for the latest key. Askers of one key share one computation.

    A task may be cancelled while its training runs on; the next task for the same key then takes the result over
    instead of training again. Failures are not remembered.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._future: asyncio.Future[T] | None = None

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """The result for `key`, from memory, from a computation under way, or made now. Raises what `make` raised."""
        if self._future is None or self._key != key or _failed(self._future):
            self._key = key
            self._future = asyncio.ensure_future(make())
            # If nobody waits any more, a failure is nobody's: it comes again when it is asked for again.
            self._future.add_done_callback(_failed)
        return await asyncio.shield(self._future)

    def forget(self) -> None:
        """Drop the result; a computation under way goes on for those who await it."""
        self._key, self._future = None, None


def _failed(future: "asyncio.Future[T]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
