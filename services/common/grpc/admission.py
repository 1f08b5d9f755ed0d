"""Admission by calls in flight: a server that is full says so at once, and nobody fills it alone."""

from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.telemetry import SHED


class Admission:
    """Bounds on the calls in flight. most: of all callers. most_of_one: of one hospital or operator.

    A service calls for everybody, so only the first bound is for it. Used from one event loop.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._of: Tally[Identity] = Tally()
        self._all = 0

    @contextmanager
    def entered(self, identity: Identity) -> Iterator[None]:
        """A call of this caller, as long as it lasts.

        Raises: FedmeshError: RATE_LIMITED when the caller has too many, SERVICE_UNAVAILABLE when all have.
        """
        if identity.kind is not Kind.SERVICE and self._of[identity] >= self._most_of_one:
            SHED.labels("caller").inc()
            raise FedmeshError(
                Code.RATE_LIMITED,
                f"{self._most_of_one} calls of {identity.name} are in flight: end some, then try again",
            )
        if self._all >= self._most:
            SHED.labels("server").inc()
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "too many calls are in flight here: try again in a moment")
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
