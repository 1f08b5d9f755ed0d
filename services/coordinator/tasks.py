"""What hospitals are asked to do in each state of an attempt. A task says all that is needed to do it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.coordinator.domain.attempt import Attempt, Phase
from services.coordinator.wire import (
    timestamp_ms,
    wire_attempt,
    wire_contributions,
    wire_opening,
    wire_signatures,
    wire_signed,
)
from services.secure_sum.opening import Opening
from services.secure_sum.statements import Signed

Tasks = list[tuple[str, bytes]]
"""Pairs of a hospital and a serialised Task."""


@dataclass(frozen=True)
class Papers:
    """The statements that the tasks of a phase carry. shares: by recipient."""

    adverts: Sequence[Signed] = ()
    shares: Mapping[str, Sequence[Signed]] = field(default_factory=dict)
    uploads: Sequence[Signed] = ()
    confirmations: Mapping[str, bytes] = field(default_factory=dict)
    opening: Opening | None = None


NO_PAPERS: Final = Papers()


def phase_tasks(attempt: Attempt, papers: Papers = NO_PAPERS) -> Tasks:
    """The tasks that begin the attempt's present phase."""
    return _MAKERS[attempt.phase](attempt, papers)


def ended_tasks(attempt: Attempt, how: str, version: int, state_sha256: str) -> Tasks:
    """Tell the cohort that the job has ended. how: in words. version, state_sha256: the job's last."""
    ended = _task(attempt, pb.TASK_KIND_JOB_ENDED)
    ended.base_version = version
    ended.base_state_sha256 = state_sha256
    ended.reason = how
    return _for(attempt.cohort, ended)


def _training(attempt: Attempt, _papers: Papers) -> Tasks:
    return _for(attempt.cohort, _task(attempt, pb.TASK_KIND_TRAIN))


def _share(attempt: Attempt, papers: Papers) -> Tasks:
    if attempt.sharers:
        return []
    task = _task(attempt, pb.TASK_KIND_SHARE)
    task.adverts.extend(wire_signed(papers.adverts))
    return _for(attempt.group, task)


def _upload(attempt: Attempt, papers: Papers) -> Tasks:
    task = _task(attempt, pb.TASK_KIND_UPLOAD)
    task.adverts.extend(wire_signed(papers.adverts))
    # Serialised messages that follow each other are one message: only the shares differ between hospitals.
    common = task.SerializeToString()
    return [
        (name, common + pb.Task(shares=wire_signed(papers.shares[name])).SerializeToString())
        for name in attempt.members
    ]


def _confirm(attempt: Attempt, _papers: Papers) -> Tasks:
    return _for(attempt.members, _task(attempt, pb.TASK_KIND_CONFIRM))


def _unmask(attempt: Attempt, papers: Papers) -> Tasks:
    if attempt.unopened:
        return []
    task = _task(attempt, pb.TASK_KIND_UNMASK)
    task.confirmations.extend(wire_signatures(papers.confirmations))
    return _for(attempt.members, task)


def _decrypt(attempt: Attempt, papers: Papers) -> Tasks:
    task = _task(attempt, pb.TASK_KIND_DECRYPT)
    if papers.opening is not None:
        task.opening.CopyFrom(wire_opening(papers.opening))
    task.uploads.extend(wire_signed(papers.uploads))
    return _for(attempt.members, task)


def _finalize(attempt: Attempt, _papers: Papers) -> Tasks:
    return _for([attempt.finalizer], _task(attempt, pb.TASK_KIND_FINALIZE))


def _attest(attempt: Attempt, _papers: Papers) -> Tasks:
    return _for(attempt.members, _task(attempt, pb.TASK_KIND_ATTEST))


def _committed(attempt: Attempt, _papers: Papers) -> Tasks:
    task = _task(attempt, pb.TASK_KIND_COMMITTED)
    task.base_version = attempt.round
    return _for(attempt.cohort, task)


def _burnt(attempt: Attempt, _papers: Papers) -> Tasks:
    task = _task(attempt, pb.TASK_KIND_BURNT)
    task.reason = attempt.reason
    return _for(attempt.cohort, task)


def _aborted(attempt: Attempt, _papers: Papers) -> Tasks:
    task = _task(attempt, pb.TASK_KIND_ABORTED)
    task.reason = attempt.reason
    return _for(attempt.cohort, task)


_MAKERS: Final[dict[Phase, Callable[[Attempt, Papers], Tasks]]] = {
    Phase.TRAINING: _training,
    Phase.SHARE: _share,
    Phase.UPLOAD: _upload,
    Phase.CONFIRM: _confirm,
    Phase.UNMASK: _unmask,
    Phase.AGREE: _decrypt,
    Phase.FINALIZE: _finalize,
    Phase.ATTEST: _attest,
    Phase.COMMITTED: _committed,
    Phase.ABORTED: _aborted,
    Phase.BURNT: _burnt,
}


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
        roster_sha256=attempt.roster_sha256,
        epoch=attempt.epoch,
        sharers=attempt.sharers,
        survivors=attempt.survivors.encode(),
    )
