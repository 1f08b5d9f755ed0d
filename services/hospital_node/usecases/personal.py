"""After a job: this hospital's own model, made from the last version and kept here."""

from services.common.telemetry import get_logger
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.extras import ExtraSteps
from services.hospital_node.usecases.jobs import Accepted

log = get_logger(__name__)


class PersonalSteps(ExtraSteps):
    async def personalise(self, task: Task) -> None:
        """Make the personal model of a job that went through all its rounds, if its plan has one; once.

        Nothing of it is sent, no budget is touched, and nothing that it found is logged. It is an extra: whatever goes
        wrong is logged and leaves the job as it is.

        Raises: FedmeshError(STORE_FULL), to be tried again.
        """
        await self.make_extra(
            task, "personal_model_missed", lambda manifest: manifest.personalisation is not None, self._make
        )

    async def _make(self, task: Task, accepted: Accepted) -> None:
        job_id, version = task.attempt.job_id, task.base_version
        if await on_disk(self._t.personal.load, job_id, version) is not None:
            return
        patience_s = self.patience(task)
        state = await self._t.states.open_base(task, accepted.roster, patience_s)
        trainer = await self._t.jobs.local(task, accepted)
        model = await self.train(trainer.personalise, state)
        await on_disk(self._t.personal.save, job_id, version, model)
        log.info("personal_model_kept", job_id=job_id, version=version)
