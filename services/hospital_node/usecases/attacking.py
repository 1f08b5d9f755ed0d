"""After a job: attacks on membership against this hospital's own rows, whose report is kept here."""

from services.common.telemetry import get_logger
from services.hospital_node.domain.attacks import AttackReport
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.extras import ExtraSteps
from services.hospital_node.usecases.jobs import Accepted

log = get_logger(__name__)


class AttackSteps(ExtraSteps):
    async def attack(self, task: Task) -> None:
        """Attack the last version of a job that went through all its rounds, if its plan has checks; once.

        Nothing of it is sent, no budget is touched, and nothing that it found is logged. It comes after everything that
        this hospital says of the job. It is an extra: whatever goes wrong is logged and leaves the job as it is.

        Raises: FedmeshError(STORE_FULL), to be tried again.
        """
        await self.make_extra(task, "attacks_missed", lambda manifest: manifest.checks is not None, self._attack)

    async def _attack(self, task: Task, accepted: Accepted) -> None:
        job_id, version = task.attempt.job_id, task.base_version
        if await on_disk(self._t.attacks.has, job_id, version):
            return
        state = await self._t.states.open_base(task, accepted.roster, self.patience(task))
        trainer = await self._t.jobs.local(task, accepted)
        found = await self.train(trainer.attack, state)
        now = self._t.clock.now().isoformat(timespec="seconds")
        await on_disk(self._t.attacks.save, AttackReport(job_id, version, now, found))
        log.info("attacks_kept", job_id=job_id, version=version)
