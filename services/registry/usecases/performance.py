"""How models do over time."""

from services.common.identity import Identity
from services.registry.domain.performance import DailyMeasurement, Measurement, Subject
from services.registry.usecases.jobs import find_job, require_job
from services.registry.usecases.ports import Store, Transaction


class PerformanceUseCases:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(
        self, caller: Identity, subject: Subject, after: int, versions: int
    ) -> tuple[tuple[Measurement, ...], int]:
        """The numbers of a job's next versions, and the last of these; 0 when there are no more.

        Raises: FedmeshError(NOT_FOUND) when the caller may see no such job.
        """

        assert subject.job_id is not None
        last = after + versions
        found, newest = await self._store.ask(
            "ListPerformance", caller, lambda tx: tx.performance.of_versions(subject, after, last)
        )
        if newest is None:
            newest = (await require_job(self._store, "ListPerformance.job", caller, subject.job_id)).version
        return found, last if last < newest else 0

    async def by_day(self, caller: Identity, subject: Subject, days: int) -> tuple[DailyMeasurement, ...]:
        """Raises: FedmeshError(NOT_FOUND) when the caller may see no such job; a model without jobs has no days."""

        async def body(tx: Transaction) -> tuple[DailyMeasurement, ...]:
            if subject.job_id is not None:
                await find_job(tx, subject.job_id)
            return await tx.performance.by_day(subject, days)

        return await self._store.run("SummarizePerformance", caller, body)

    async def tend(self) -> tuple[int, int]:
        """Raises: FedmeshError when the database is away or busy: to be tried again."""
        return await self._store.run("performance.tend", None, lambda tx: tx.performance.tend())
