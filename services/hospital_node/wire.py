"""Conversion of the centre's messages to the node's own types, and back."""

import re
from collections.abc import Iterable
from datetime import UTC
from typing import Final

from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2 as registry_pb

from services.common.errors import Code, FedmeshError
from services.common.ids import is_uuid
from services.hospital_node.domain.ports import LedgerStanding
from services.hospital_node.domain.tasks import AttemptId, Contribution, Task, TaskKind
from services.privacy.chain import Head
from services.secure_sum.opening import Opening
from services.secure_sum.statements import Signed
from services.secure_sum.wire import Layout

_MOST: Final = 2**31 - 1
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_KINDS: Final[dict[int, TaskKind]] = {
    pb.TASK_KIND_TRAIN: TaskKind.TRAIN,
    pb.TASK_KIND_SHARE: TaskKind.SHARE,
    pb.TASK_KIND_UPLOAD: TaskKind.UPLOAD,
    pb.TASK_KIND_CONFIRM: TaskKind.CONFIRM,
    pb.TASK_KIND_UNMASK: TaskKind.UNMASK,
    pb.TASK_KIND_DECRYPT: TaskKind.DECRYPT,
    pb.TASK_KIND_FINALIZE: TaskKind.FINALIZE,
    pb.TASK_KIND_ATTEST: TaskKind.ATTEST,
    pb.TASK_KIND_COMMITTED: TaskKind.COMMITTED,
    pb.TASK_KIND_ABORTED: TaskKind.ABORTED,
    pb.TASK_KIND_BURNT: TaskKind.BURNT,
    pb.TASK_KIND_JOB_ENDED: TaskKind.JOB_ENDED,
}


def wire_attempt(attempt: AttemptId) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt)


def wire_form(layout: Layout) -> round_pb2.SumForm:
    return round_pb2.SumForm(parameter_set=layout.params.name, lanes=layout.lanes, vector_length=layout.vector_length)


def wire_signed(signed: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=signed.hospital_id, statement=signed.statement, signature=signed.signature)


def parse_signed(message: round_pb2.Signed) -> Signed:
    return Signed(message.hospital_id, message.statement, message.signature)


def parse_task(message: pb.Task) -> Task | None:
    """A task; None for a kind that this build does not know, which it leaves to newer ones, and for no job's."""
    kind = _KINDS.get(message.kind)
    named = message.attempt
    # What is numbered or named otherwise could be written into the ledger, and never be read again.
    if kind is None or not is_uuid(named.job_id) or max(named.round, named.attempt) > _MOST:
        return None
    return Task(
        kind=kind,
        attempt=AttemptId(message.attempt.job_id, message.attempt.round, message.attempt.attempt),
        plan_id=message.plan_id,
        base_version=message.base_version,
        base_state_sha256=message.base_state_sha256,
        deadline=message.deadline.ToDatetime(tzinfo=UTC) if message.HasField("deadline") else None,
        group=tuple(message.group),
        cohort=tuple(message.cohort),
        contributions=tuple(Contribution(item.hospital_id, item.ciphertext_sha256) for item in message.contributions),
        sum_sha256=message.sum_sha256,
        finalizer=message.finalizer,
        next_state_sha256=message.next_state_sha256,
        reason=message.reason,
        roster_sha256=message.roster_sha256,
        epoch=message.epoch,
        adverts=_all_signed(message.adverts),
        shares=_all_signed(message.shares),
        sharers=tuple(message.sharers),
        survivors=message.survivors,
        confirmations={item.hospital_id: item.signature for item in message.confirmations},
        opening=Opening(_seeds(message.opening.self_seeds), _seeds(message.opening.mask_seeds)),
        uploads=_all_signed(message.uploads),
    )


def _all_signed(messages: Iterable[round_pb2.Signed]) -> tuple[Signed, ...]:
    return tuple(parse_signed(message) for message in messages)


def _seeds(messages: Iterable[round_pb2.OpenedSeed]) -> dict[str, bytes]:
    return {message.hospital_id: message.seed for message in messages}


def parse_standing(head: registry_pb.LedgerHead, *, differs: bool = False) -> LedgerStanding:
    """What the registry says that it has of this hospital's ledger. Raises: FedmeshError(DATA_INVALID) for no head."""
    if head.seq > _MOST or (head.seq == 0) != (head.sha256 == "") or not _SHA256.fullmatch(head.sha256 or 64 * "0"):
        raise FedmeshError(Code.DATA_INVALID, "the registry tells of a privacy ledger that cannot be")
    return LedgerStanding(Head(head.seq, head.sha256), head.signature, differs)
