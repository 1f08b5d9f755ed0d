"""Renewing this hospital's certificate by the one that it has, long before that ends."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, Protocol

from cryptography import x509
from prometheus_client import Counter, Gauge

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger

log = get_logger(__name__)

RENEWALS: Final = Counter("fedmesh_hospital_renewals_total", "Tries to renew the certificate by outcome", ["outcome"])
SECONDS_LEFT: Final = Gauge("fedmesh_hospital_certificate_seconds_left", "Until the present certificate ends")

# Of the certificate's time here: hospitals that enrolled together do not come back together, and all before two thirds.
_FROM: Final = 0.5
_TO: Final = 0.65
_FIRST_PAUSE_S: Final = 30.0
# A hospital that is refused until its certificate ends is a line in the audit log at every try.
_LEAST_PAUSE_S: Final = 10.0
# For so long at most nobody looks at the clock, which may be set meanwhile.
_LONGEST_PAUSE_S: Final = 600.0


class Credentials(Protocol):
    """See `services.common.credentials.CredentialFolder`."""

    def present(self) -> tuple[datetime, datetime]: ...
    def request(self, hospital_id: str) -> bytes: ...
    def forget_request(self) -> None: ...
    def install(self, certificate_pem: bytes, hospital_id: str) -> x509.Certificate: ...


class Renewal:
    """ask: sends a signing request (DER) to the registry and returns the certificate (PEM)."""

    def __init__(
        self,
        hospital_id: str,
        credentials: Credentials,
        ask: Callable[[bytes], Awaitable[bytes]],
        clock: Clock,
    ) -> None:
        self._hospital_id = hospital_id
        self._credentials = credentials
        self._ask = ask
        self._clock = clock

    async def keep(self) -> None:
        """Renew again and again until cancelled. Nothing that the registry or the disk does ends this loop."""
        share, failures = random.uniform(_FROM, _TO), 0  # noqa: S311 - spreads load
        while True:
            try:
                wait_s = self.wait_s(share)
                if wait_s <= 0:
                    await self.renew()
                    share, failures = random.uniform(_FROM, _TO), 0  # noqa: S311 - spreads load
                    continue
            except FedmeshError as error:
                failures += 1
                RENEWALS.labels("failed").inc()
                log.error("certificate_not_renewed", code=error.code.value, reason=error.message, failures=failures)
                wait_s = self.pause_s(failures) * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
            except Exception as error:
                failures += 1
                RENEWALS.labels("failed").inc()
                log.error("renewal_failed", exc_info=error)
                wait_s = _LONGEST_PAUSE_S
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S))

    def wait_s(self, share: float) -> float:
        """Seconds until `share` of the present certificate's time is over.

        Raises: FedmeshError(CONFIG_INVALID) when there is none.
        """
        since, until = self._credentials.present()
        now = self._clock.now()
        SECONDS_LEFT.set((until - now).total_seconds())
        return (since + (until - since) * share - now).total_seconds()

    def pause_s(self, failures: int) -> float:
        """Seconds between two tries, doubling; the less time is left, the shorter."""
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * float(1 << min(failures - 1, 20)))
        try:
            _, until = self._credentials.present()
        except FedmeshError:
            return pause_s
        return max(_LEAST_PAUSE_S, min(pause_s, (until - self._clock.now()).total_seconds() / 20))

    async def renew(self) -> None:
        """Ask with a new key, and put the answer in the place of what is there.

        Raises: FedmeshError as the registry or the disk.
        """
        csr = await asyncio.to_thread(self._credentials.request, self._hospital_id)
        try:
            pem = await self._ask(csr)
        except FedmeshError as error:
            if error.code in (Code.WRONG_STATE, Code.INVALID_ARGUMENT):
                # The registry will never take this request: the next try makes another.
                await asyncio.to_thread(self._credentials.forget_request)
            raise
        made = await asyncio.to_thread(self._credentials.install, pem, self._hospital_id)
        RENEWALS.labels("renewed").inc()
        log.info("certificate_renewed", serial=f"{made.serial_number:x}", until=made.not_valid_after_utc.isoformat())
