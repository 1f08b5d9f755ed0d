"""Token buckets, one for each of the keys that were seen last."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

_REMEMBERED: Final = 4096
KeyT = TypeVar("KeyT", bound=Hashable)


class Buckets(Generic[KeyT]):
    """Each key may take `burst` tokens at once and `per_s` a second for ever. now: a clock in seconds.

    A key that was not seen for longer than 4,096 others begins with a full bucket again.
    """

    def __init__(self, per_s: float, burst: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._now = now
        self._left: OrderedDict[KeyT, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._left)

    def take(self, key: KeyT) -> bool:
        """Take a token; False when there is none, which costs nothing."""
        now = self._now()
        left, at = self._left.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_s)
        taken = left >= 1
        self._left[key] = (left - taken, now)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        return taken
