"""The checks that only hospitals can make: noted as rounds are opened, signed and reported when the job has ended."""

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Int64Vector, Measured
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.jobs import Accepted, Verdict
from services.hospital_node.usecases.steps import Steps
from services.transparency.findings import Findings

log = get_logger(__name__)


class CheckSteps(Steps):
    async def note(self, task: Task, total: Int64Vector) -> None:
        """Keep what an opened sum tells of the model, if the job's plan has checks. Durable on return."""
        manifest = (await self.accepted(task)).manifest
        if manifest.checks is None:
            return
        peak = float(abs(total).max()) / (1 << (manifest.encoding.bits - 1))
        measuring = task.attempt.round == manifest.measuring_round
        values = total[manifest.train_length :] if measuring else None
        await on_disk(self._t.measured.note, task.attempt.job_id, Measured({task.attempt.round: peak}, values))

    async def report(self, task: Task) -> None:
        """Sign and report the checks of a job that went through all its rounds, if its plan has any.

        Raises: FedmeshError when the registry is away, to be tried again.
        """
        try:
            accepted = await self._t.jobs.agreed(task, self.patience(task))
            manifest = accepted.manifest
            if manifest.checks is not None and task.base_version == manifest.rounds.count:
                await self._report(task, accepted)
        except Verdict as verdict:
            _missed(task, verdict.error)
        except FedmeshError as error:
            if error.retryable:
                raise
            _missed(task, error)

    async def _report(self, task: Task, accepted: Accepted) -> None:
        job_id = task.attempt.job_id
        seen = await on_disk(self._t.measured.load, job_id)
        if seen.values is None:
            raise FedmeshError(Code.WRONG_STATE, "this hospital did not open the measuring round")
        trainer = await self._t.jobs.local(task, accepted)
        found = await self.train(trainer.findings, seen.peaks, seen.values)
        keys = self._t.keys
        said = Findings(keys.hospital_id, job_id, task.base_version, task.base_state_sha256, found)
        await self._t.mesh.report_checks(said.to_bytes(), said.sign(keys.signing), self.patience(task))
        await on_disk(self._t.measured.forget, job_id)
        log.info("checks_reported", job_id=job_id, passed=all(item.passed for item in found))


def _missed(task: Task, error: FedmeshError) -> None:
    log.warning("checks_missed", job_id=task.attempt.job_id, code=error.code.value, reason=error.message)
