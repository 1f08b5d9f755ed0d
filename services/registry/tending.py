"""Looks after the tables of measurements: partitions for the months to come, none for months that are over."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from prometheus_client import Counter, Gauge

from services.common.errors import FedmeshError
from services.common.telemetry import get_logger

log = get_logger(__name__)

_INTERVAL_S: Final = 3600.0
_AGAIN_S: Final = 60.0
_MADE: Final = Counter("fedmesh_registry_measurement_partitions_made_total", "Monthly partitions made")
_DROPPED: Final = Counter("fedmesh_registry_measurement_partitions_dropped_total", "Monthly partitions dropped")
_TENDED: Final = Gauge(
    "fedmesh_registry_measurements_tended_timestamp_seconds", "When the tables of measurements were last looked after"
)


class MeasurementTender:
    """Several replicas may run one each: the database lets one of them work."""

    def __init__(self, tend: Callable[[], Awaitable[tuple[int, int]]]) -> None:
        self._tend = tend

    async def run(self) -> None:
        """Work until cancelled. A database that is away or busy ends nothing: there are partitions for months ahead."""
        while True:
            try:
                await self.work()
                pause = _INTERVAL_S
            except FedmeshError as error:
                log.warning("measurements_not_tended", code=error.code.value, reason=error.message)
                pause = _AGAIN_S
            await asyncio.sleep(pause * random.uniform(0.9, 1.1))  # noqa: S311 - spreads load

    async def work(self) -> None:
        """Work once. Raises: FedmeshError."""
        made, dropped = await self._tend()
        _MADE.inc(made)
        _DROPPED.inc(dropped)
        _TENDED.set_to_current_time()
        if made or dropped:
            log.info("measurements_tended", made=made, dropped=dropped)
