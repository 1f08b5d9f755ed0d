"""How far behind the log its witnesses are, as metrics."""

import asyncio
from typing import Final

from prometheus_client import Gauge

from services.audit.ports import Store, Transaction
from services.common.errors import FedmeshError
from services.common.telemetry import get_logger

log = get_logger(__name__)

_INTERVAL_S: Final = 10.0
# A look reads so many of the newest cosignatures; of a hospital that is further behind, the last one is remembered.
_NEWEST: Final = 10_000
_AGE: Final = Gauge(
    "fedmesh_audit_witness_age_seconds",
    "For how long the log has held entries that a hospital has not cosigned",
    ["hospital"],
)


class WitnessWatch:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._sizes: dict[str, int] = {}

    async def run(self) -> None:
        """Look until cancelled. A database that is away ends nothing: the age of every witness then stays as it was."""
        while True:
            try:
                await self.look()
            except FedmeshError as error:
                log.warning("witnesses_not_read", code=error.code.value, reason=error.message)
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Measure once. Raises: FedmeshError."""
        ages = await self._store.run("witness_ages", self._read)
        for hospital_id, age in ages.items():
            _AGE.labels(hospital_id).set(age)

    async def _read(self, tx: Transaction) -> dict[str, float]:
        sizes = await tx.cosigned_sizes(_NEWEST if self._sizes else None)
        self._sizes |= sizes
        return await tx.uncosigned_ages(self._sizes)
