"""What hospitals are asked to do in each state of an attempt. A task says all that is needed to do it."""

from collections.abc import Iterable

from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.coordinator.domain.attempt import Attempt, Phase
from services.coordinator.outward import timestamp_ms, wire_attempt, wire_contributions

Tasks = list[tuple[str, bytes]]
"""Pairs of a hospital and a serialised Task."""


def phase_tasks(attempt: Attempt) -> Tasks:
    """The tasks that begin the attempt's present phase."""
    if attempt.phase is Phase.TRAINING:
        return [] if attempt.group else _for(attempt.cohort, _task(attempt, pb.TASK_KIND_TRAIN))
    if attempt.phase is Phase.UPLOAD:
        return _for(attempt.group, _task(attempt, pb.TASK_KIND_UPLOAD))
    if attempt.phase is Phase.AGREE:
        return _for(attempt.contributors, _task(attempt, pb.TASK_KIND_DECRYPT))
    if attempt.phase is Phase.FINALIZE:
        return _for([attempt.finalizer], _task(attempt, pb.TASK_KIND_FINALIZE))
    if attempt.phase is Phase.ATTEST:
        return _for(attempt.members, _task(attempt, pb.TASK_KIND_ATTEST))
    if attempt.phase is Phase.COMMITTED:
        committed = _task(attempt, pb.TASK_KIND_COMMITTED)
        committed.base_version = attempt.round
        return _for(attempt.cohort, committed)
    aborted = _task(attempt, pb.TASK_KIND_ABORTED)
    aborted.reason = attempt.reason
    return _for(attempt.cohort, aborted)


def ended_tasks(attempt: Attempt, how: str, version: int, state_sha256: str) -> Tasks:
    """Tell the cohort that the job has ended. how: in words. version, state_sha256: the job's last."""
    ended = _task(attempt, pb.TASK_KIND_JOB_ENDED)
    ended.base_version = version
    ended.base_state_sha256 = state_sha256
    ended.reason = how
    return _for(attempt.cohort, ended)


def _for(hospital_ids: Iterable[str], task: pb.Task) -> Tasks:
    content = task.SerializeToString()
    return [(hospital_id, content) for hospital_id in hospital_ids]


def _task(attempt: Attempt, kind: pb.TaskKind.ValueType) -> pb.Task:
    return pb.Task(
        kind=kind,
        attempt=wire_attempt(attempt.id),
        plan_id=attempt.plan_id,
        base_version=attempt.base_version,
        base_state_sha256=attempt.base_state_sha256,
        deadline=timestamp_ms(attempt.deadline_ms),
        group=attempt.group,
        cohort=attempt.cohort,
        contributions=wire_contributions(attempt),
        sum_sha256=attempt.sum_sha256,
        finalizer=attempt.finalizer,
        next_state_sha256=attempt.next_state_sha256,
    )
