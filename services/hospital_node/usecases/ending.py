"""How attempts and jobs end at the hospital."""

from services.common.telemetry import get_logger
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.attacking import AttackSteps
from services.hospital_node.usecases.checking import CheckSteps
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.personal import PersonalSteps
from services.hospital_node.usecases.steps import Steps, Tools

log = get_logger(__name__)


class EndSteps(Steps):
    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._personal, self._checks, self._attacks = PersonalSteps(tools), CheckSteps(tools), AttackSteps(tools)

    async def committed(self, task: Task) -> None:
        """Adopt the committed state, byte for byte, and let go of what led to it."""
        await self._adopt(task, task.next_state_sha256)
        await self._finish(task)

    async def aborted(self, task: Task) -> None:
        """Delete what the attempt was made of. What was charged stays spent: the sum may have been opened."""
        await self._finish(task)
        log.info("attempt_aborted", attempt=str(task.attempt), reason=task.reason)

    async def burnt(self, task: Task) -> None:
        """The version is used up: its state is the one before. What was charged stays spent."""
        await self._finish(task)
        log.warning("version_burnt", attempt=str(task.attempt), reason=task.reason)

    async def job_ended(self, task: Task) -> None:
        """Report the job's checks, make its personal model, attack it here, and forget the job; its budget is free
        again only if nothing was ever sent."""
        job_id = task.attempt.job_id
        try:
            released = await on_disk(self._t.ledger.release, job_id)
            self._t.spending.changed()
            await self.sum(self._t.secure_sum.finish_job, job_id)
            log.info("job_ended", job_id=job_id, reason=task.reason, budget_released=released)
            if task.base_state_sha256:
                # The end may overtake the last version's own task.
                await self._adopt(task, task.base_state_sha256)
                await self._checks.report(task)
                await self._personal.personalise(task)
                await self._attacks.attack(task)
        finally:
            self._t.jobs.close(job_id)

    async def _finish(self, task: Task) -> None:
        await self.sum(self._t.secure_sum.finish, task.attempt)

    async def _adopt(self, task: Task, sha256: str) -> None:
        patience_s = self.patience(task)
        roster = await self._t.rosters.get(task.roster_sha256, patience_s)
        await self._t.states.adopt_committed(task, sha256, task.base_version, roster, patience_s)
