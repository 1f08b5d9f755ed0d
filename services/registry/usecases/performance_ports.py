"""What the use cases of performance need from a store; part of `ports.Transaction`."""

from collections.abc import Sequence
from typing import Protocol

from services.registry.domain.performance import DailyMeasurement, Measurement, Subject


class Performance(Protocol):
    """Measurements, as far as the transaction may see them."""

    async def add(self, measured: Sequence[Measurement]) -> None:
        """Store numbers of hospitals. A hospital's transaction stores its own only."""
        ...

    async def of_versions(self, subject: Subject, after: int, last: int) -> tuple[tuple[Measurement, ...], int | None]:
        """Numbers of the subject's job, of its versions above `after` up to `last`, by version, hospital and name; and
        the newest version of the job, None when there are no such numbers.
        """
        ...

    async def by_day(self, subject: Subject, days: int) -> tuple[DailyMeasurement, ...]:
        """Numbers of the last days by day, hospital and name; the newest when there are too many."""
        ...

    async def tend(self) -> tuple[int, int]:
        """Look after the tables: how many partitions were made and how many dropped."""
        ...
