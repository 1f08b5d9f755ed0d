"""After a job: attacks on membership against this hospital's own rows, whose report is kept here."""

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.attacks import AttackReport
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.jobs import Accepted, Verdict
from services.hospital_node.usecases.steps import Steps

log = get_logger(__name__)


class AttackSteps(Steps):
    async def attack(self, task: Task) -> None:
        """Attack the last version of a job that went through all its rounds, if its plan has checks; once.

        Nothing of it is sent, no budget is touched, and nothing that it found is logged. It comes after everything that
        this hospital says of the job. It is an extra: whatever goes wrong is logged and leaves the job as it is.

        Raises: FedmeshError(STORE_FULL), to be tried again.
        """
        try:
            accepted = await self._t.jobs.agreed(task, self.patience(task))
            manifest = accepted.manifest
            if manifest.checks is not None and task.base_version == manifest.rounds.count:
                await self._attack(task, accepted)
        except Verdict as verdict:
            _missed(task, verdict.error.code, verdict.particulars)
        except FedmeshError as error:
            if error.code is Code.STORE_FULL:
                raise
            _missed(task, error.code, error.message)

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


def _missed(task: Task, code: Code, reason: str) -> None:
    log.warning("attacks_missed", job_id=task.attempt.job_id, code=code.value, reason=reason)
