"""Training that outlives the round it began in: a slow hospital's result goes into a later one."""

import asyncio
from collections.abc import Awaitable, Callable

from services.common.telemetry import get_logger
from services.hospital_node.domain.staleness import Trained
from services.hospital_node.domain.tasks import Task

log = get_logger(__name__)


class Trainings:
    """The newest training of one job, under way or finished. A task may be cancelled while its training runs on."""

    def __init__(self) -> None:
        self._base: tuple[int, str] | None = None
        self._future: asyncio.Future[Trained] | None = None

    async def get(
        self,
        task: Task,
        oldest: int,
        make: Callable[[], Awaitable[Trained]],
        used: Callable[[Trained], Awaitable[bool]],
    ) -> Trained:
        """A result that may go into the task's round: from memory, from training under way, or made now.

        oldest: the plan's bound on its age. An older one is thrown away, also while it is being made, and so is one
        that went into another version, which `used` knows. Raises what `make` raised.
        """
        while True:
            if self._future is None or _failed(self._future) or not self._fits(task, oldest):
                self._begin(task, make)
            assert self._future is not None
            trained = await asyncio.shield(self._future)
            if not await used(trained):
                return trained
            self.forget()

    def forget(self) -> None:
        """Drop the result; training under way goes on for those who await it."""
        self._base, self._future = None, None

    def _fits(self, task: Task, oldest: int) -> bool:
        assert self._base is not None
        version, state_sha256 = self._base
        age = task.base_version - version
        if 0 < oldest < age:
            facts = {"job_id": task.attempt.job_id, "version": version, "age": age}
            log.info("training_discarded", oldest=oldest, **facts)
        # The same version has one state; whoever names another one gets no result of the first.
        return 0 <= age <= oldest and (age > 0 or state_sha256 == task.base_state_sha256)

    def _begin(self, task: Task, make: Callable[[], Awaitable[Trained]]) -> None:
        if self._future is not None:
            # Whoever asked for it has been superseded. What has begun on the worker goes on unheard.
            self._future.cancel()
        self._base = (task.base_version, task.base_state_sha256)
        self._future = asyncio.ensure_future(make())
        # If nobody waits any more, a failure is nobody's: it comes again when it is asked for again.
        self._future.add_done_callback(_failed)


def _failed(future: "asyncio.Future[Trained]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
