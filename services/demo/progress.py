"""What the demonstration knows while it runs, read from the services as any operator could."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import registry_pb2

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call

POLL_S: Final = 0.5


@dataclass
class Progress:
    """A snapshot that grows: the view draws it, the report reads it.

    rounds: committed so far, oldest first. metrics: by version, then by name; unmeasured: why this person may not see
    them.
    """

    hospitals: tuple[str, ...]
    total_rounds: int = 0
    connected: set[str] = field(default_factory=set)
    phase: str = "starting"
    round_number: int = 0
    attempt: int = 0
    finished: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    uploaded_bytes: int = 0
    rounds: list[registry_pb2.CommittedRound] = field(default_factory=list)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    unmeasured: str = ""
    job: registry_pb2.Job | None = None
    note: str = ""

    @property
    def ended(self) -> bool:
        return self.job is not None and self.job.status != registry_pb2.JOB_STATUS_RUNNING


async def watch_job(
    registry: Any, coordinator: Any, job_id: str, progress: Progress, changed: Callable[[Progress], Awaitable[None]]
) -> None:
    """Follow a job until it ends. A service that is away for a while is waited for.

    Raises: FedmeshError for anything but a passing outage.
    """
    while True:
        try:
            await _refresh(registry, coordinator, job_id, progress)
            progress.note = ""
        except FedmeshError as error:
            if not error.retryable:
                raise
            progress.note = f"waiting: {error.message}"
        await changed(progress)
        if progress.ended:
            return
        await asyncio.sleep(POLL_S)


async def _refresh(registry: Any, coordinator: Any, job_id: str, progress: Progress) -> None:
    # The job first: when it has ended, everything read after it is final.
    progress.job = (await call(registry.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job
    seen = progress.rounds[-1].version if progress.rounds else 0
    if progress.job.version > seen:
        answer = await call(registry.ListRounds, registry_pb2.ListRoundsRequest(job_id=job_id, after_version=seen))
        progress.rounds.extend(answer.rounds)
        await _refresh_metrics(registry, job_id, progress)
    progress.uploaded_bytes = sum(r.upload_bytes * len(r.contributions) for r in progress.rounds)
    if not progress.ended:
        await _refresh_round(coordinator, job_id, progress)


async def _refresh_metrics(registry: Any, job_id: str, progress: Progress) -> None:
    try:
        measured = await call(registry.ListMetrics, registry_pb2.ListMetricsRequest(job_id=job_id))
    except FedmeshError as error:
        if error.code is not Code.PERMISSION_DENIED:
            raise
        progress.unmeasured = error.message
        return
    for metric in measured.metrics:
        progress.metrics.setdefault(metric.version, {})[metric.name] = metric.value


async def _refresh_round(coordinator: Any, job_id: str, progress: Progress) -> None:
    try:
        now = await call(coordinator.GetRound, coordinator_pb2.GetRoundRequest(job_id=job_id))
    except FedmeshError as error:
        if error.code is Code.NOT_FOUND:
            return  # between two attempts
        raise
    progress.phase = coordinator_pb2.Phase.Name(now.phase).removeprefix("PHASE_").lower()
    progress.round_number, progress.attempt = now.attempt.round, now.attempt.attempt
    progress.connected = {entry.hospital_id for entry in now.progress if entry.connected}
    progress.finished = {
        entry.hospital_id: coordinator_pb2.Phase.Name(entry.finished).removeprefix("PHASE_").lower()
        for entry in now.progress
    }
    progress.declined = {entry.hospital_id: entry.decline_reason for entry in now.progress if entry.declined}
