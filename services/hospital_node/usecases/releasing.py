"""Budget that was set aside for a job whose end this hospital never heard of."""

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Ledger, Mesh
from services.hospital_node.usecases.disk import on_disk

log = get_logger(__name__)


async def release_ended(ledger: Ledger, mesh: Mesh, patience_s: float) -> bool:
    """Give back what is set aside for jobs that the registry says are over and that were never charged; whether there
    were any.

    The end of a job is a task, and tasks are lost with the coordinator's Redis; the registry knows. Its word is enough,
    as the task's is: nothing was sent of these jobs, and nothing can be any more without another reservation. What was
    charged once stays spent whatever anybody says.

    Raises: FedmeshError of the registry, or of the ledger.
    """
    released = False
    for job_id in await on_disk(ledger.unused):
        if await _is_over(mesh, job_id, patience_s) and await on_disk(ledger.release, job_id):
            log.info("reservation_released", job_id=job_id, reason="the registry says that the job is over")
            released = True
    return released


async def _is_over(mesh: Mesh, job_id: str, patience_s: float) -> bool:
    try:
        return (await mesh.get_job(job_id, patience_s)).over
    except FedmeshError as error:
        # A registry that was restored from before the job: nobody knows whether it is over.
        if error.code is Code.NOT_FOUND:
            return False
        raise
