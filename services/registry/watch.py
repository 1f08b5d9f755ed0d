"""The hospitals as the registry knows them, as metrics: standing, strikes, and what is left of their privacy budget.

The budget comes from what hospitals reported of their own ledgers, which are authoritative and which alone refuse.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from prometheus_client import Gauge

from services.common.clock import Clock
from services.common.errors import FedmeshError
from services.common.telemetry import get_logger
from services.privacy.budget import Limit, Remaining
from services.privacy.chain import Entry
from services.privacy.reported import ReportedSpending
from services.registry.config import BudgetConfig, StrikeConfig
from services.registry.domain.entities import Hospital, HospitalStatus
from services.registry.usecases.ports import Store, Transaction

log = get_logger(__name__)

_INTERVAL_S: Final = 10.0
_PAGE: Final = 1000
_STATUS: Final = Gauge(
    "fedmesh_registry_hospital_status", "1 for the status that a hospital has", ["hospital", "status"]
)
_STRIKES: Final = Gauge("fedmesh_registry_hospital_strikes", "Strikes of a hospital that count now", ["hospital"])
_STRIKE_LIMIT: Final = Gauge("fedmesh_registry_strike_limit", "Strikes that suspend a hospital")
_EPSILON_LEFT: Final = Gauge(
    "fedmesh_registry_epsilon_left",
    "Epsilon that a hospital's population may still lose, as far as reported",
    ["hospital"],
)
_EPSILON_LIMIT: Final = Gauge("fedmesh_registry_epsilon_limit", "Epsilon that a population may lose in 365 days")


@dataclass(frozen=True)
class Budgets:
    """What hospitals had left when the ledgers were read, by hospital id."""

    at: datetime
    epsilon_limit: float
    left: Mapping[str, Remaining]


class HospitalWatch:
    seen: Budgets | None = None
    """What the last complete look found."""

    def __init__(self, store: Store, clock: Clock, budget: BudgetConfig, strikes: StrikeConfig) -> None:
        self._store = store
        self._clock = clock
        self._limit = Limit(budget.epsilon_limit, budget.delta_limit)
        self._window = timedelta(seconds=strikes.window_s)
        self._spending: defaultdict[str, ReportedSpending] = defaultdict(ReportedSpending)
        _STRIKE_LIMIT.set(strikes.limit)
        _EPSILON_LIMIT.set(budget.epsilon_limit)

    async def run(self) -> None:
        """Look until cancelled. A database that is away ends nothing: all figures then stay as they were."""
        while True:
            try:
                await self.look()
            except FedmeshError as error:
                log.warning("hospitals_not_read", code=error.code.value, reason=error.message)
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Measure once. Raises: FedmeshError."""
        now = self._clock.now()
        since = now - self._window
        hospitals = await self._store.ask("watch.hospitals", None, lambda tx: tx.hospitals.list(since))
        while await self._read_ledgers():
            pass
        left = {hospital.hospital_id: self._show(hospital, now) for hospital in hospitals}
        self.seen = Budgets(now, self._limit.epsilon, left)

    async def _read_ledgers(self) -> bool:
        """Read a page of what is new; True when there may be more."""
        known: Mapping[str, int] = {name: spending.seq for name, spending in self._spending.items()}

        async def read(tx: Transaction) -> Sequence[tuple[str, Entry]]:
            return await tx.ledgers.newer(known, _PAGE)

        fresh = await self._store.run("watch.ledgers", None, read)
        for hospital_id, entry in fresh:
            self._spending[hospital_id].add(entry)
        return len(fresh) == _PAGE

    def _show(self, hospital: Hospital, now: datetime) -> Remaining:
        name = hospital.hospital_id
        for status in HospitalStatus:
            _STATUS.labels(name, status.value).set(hospital.status is status)
        _STRIKES.labels(name).set(hospital.strikes)
        left = self._spending[name].left(now, self._limit)
        _EPSILON_LEFT.labels(name).set(left.epsilon)
        return left
