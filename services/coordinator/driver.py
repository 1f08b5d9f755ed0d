"""Keeps a runner for every job that runs, and passes wake-ups on to it."""

import asyncio
from collections.abc import Callable
from typing import Final

from services.common.errors import FedmeshError
from services.common.tasks import end_tasks
from services.common.telemetry import get_logger
from services.coordinator import metrics
from services.coordinator.outward import Registry
from services.coordinator.ports import Rounds
from services.coordinator.runner import JobRunner

log = get_logger(__name__)

_MAX_BACKOFF_S: Final = 2.0


class Driver:
    """make_runner: a runner for a job. poll_s: seconds between looks at the registry."""

    def __init__(
        self, store: Rounds, registry: Registry, make_runner: Callable[[str], JobRunner], *, poll_s: float
    ) -> None:
        self._store = store
        self._registry = registry
        self._make_runner = make_runner
        self._poll_s = poll_s
        self._runners: dict[str, tuple[JobRunner, asyncio.Task[None]]] = {}

    def wake(self, job_id: str) -> None:
        """Something was reported in a job."""
        held = self._runners.get(job_id)
        if held is not None:
            held[0].wake()

    async def run(self) -> None:
        """Look for jobs until cancelled."""
        try:
            while True:
                try:
                    await self._poll()
                except FedmeshError as error:
                    log.warning("jobs_not_listed", reason=error.message, code=error.code.value)
                await asyncio.sleep(self._poll_s)
        finally:
            await end_tasks([task for _, task in self._runners.values()])

    async def _poll(self) -> None:
        self._runners = {job_id: held for job_id, held in self._runners.items() if not held[1].done()}
        running = {job.job_id for job in await self._registry.running_jobs()}
        metrics.RUNNING.set(len(running))
        for job_id in set(self._runners) - running:
            self._runners[job_id][0].doubt()
        for job_id in running | await self._store.unfinished_jobs():
            if job_id not in self._runners:
                runner = self._make_runner(job_id)
                self._runners[job_id] = (runner, asyncio.create_task(runner.run()))
