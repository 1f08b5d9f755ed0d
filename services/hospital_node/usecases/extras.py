"""After a job: what a hospital makes of its last version for itself."""

from collections.abc import Awaitable, Callable

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.jobs import Accepted, Verdict
from services.hospital_node.usecases.steps import Steps
from services.plans.manifest import PlanManifest

log = get_logger(__name__)


class ExtraSteps(Steps):
    async def make_extra(
        self,
        task: Task,
        missed: str,
        wanted: Callable[[PlanManifest], bool],
        make: Callable[[Task, Accepted], Awaitable[None]],
    ) -> None:
        """`make` it of a job that went through all its rounds, if its plan wants it. Whatever goes wrong is logged, as
        `missed`, and leaves the job as it is.

        Raises: FedmeshError(STORE_FULL), to be tried again.
        """
        try:
            accepted = await self._t.jobs.agreed(task, self.patience(task))
            manifest = accepted.manifest
            if wanted(manifest) and task.base_version == manifest.rounds.count:
                await make(task, accepted)
        except Verdict as verdict:
            log.warning(missed, job_id=task.attempt.job_id, code=verdict.error.code.value, reason=verdict.particulars)
        except FedmeshError as error:
            if error.code is Code.STORE_FULL:
                raise
            log.warning(missed, job_id=task.attempt.job_id, code=error.code.value, reason=error.message)
