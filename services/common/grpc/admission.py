"""Admission by calls in flight and their rate: a server that is full says so at once, and nobody fills it alone."""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.config import LimitsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.buckets import Buckets
from services.common.identity import Identity, Kind
from services.common.telemetry import SHED

for _bound in ("caller", "rate", "server"):
    SHED.labels(_bound)


class Admission:
    """Bounds on the calls in flight, of all and of one hospital or operator, and on how many one of these may begin.

    A service calls for everybody, so only the first bound is for it. Each replica counts what it sees itself. Used from
    one event loop. now: a clock in seconds.
    """

    def __init__(self, limits: LimitsConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._rate: Buckets[Identity] = Buckets(limits.calls_per_s_of_one, limits.burst_of_one, now)
        self._of: Tally[Identity] = Tally()
        self._all = 0

    @contextmanager
    def entered(self, identity: Identity) -> Iterator[None]:
        """A call of this caller, as long as it lasts.

        Raises: FedmeshError: RATE_LIMITED when the caller has too many or begins too many, SERVICE_UNAVAILABLE when all
            have too many.
        """
        own = identity.kind is not Kind.SERVICE
        if own and self._of[identity] >= self._limits.calls_of_one:
            SHED.labels("caller").inc()
            raise FedmeshError(
                Code.RATE_LIMITED,
                f"{self._limits.calls_of_one} calls of {identity.name} are in flight: end some, then try again",
            )
        if self._all >= self._limits.calls:
            SHED.labels("server").inc()
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "too many calls are in flight here: try again in a moment")
        # Last: what is refused costs no token, so whoever comes again too soon is let in at its rate all the same.
        if own and not self._rate.take(identity):
            SHED.labels("rate").inc()
            raise FedmeshError(
                Code.RATE_LIMITED,
                f"{identity.name} makes more than {self._limits.calls_per_s_of_one:g} calls a second: "
                "slow down, then try again",
            )
        self._all += 1
        self._of[identity] += 1
        try:
            yield
        finally:
            self._all -= 1
            self._of[identity] -= 1
            if not self._of[identity]:
                # Callers come and go; what is remembered is no more than who is here.
                del self._of[identity]
