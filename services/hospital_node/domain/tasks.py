"""Tasks as the node understands them, and their order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from services.secure_sum.opening import Opening
from services.secure_sum.statements import AttemptRef, Signed


class TaskKind(IntEnum):
    """What a hospital is asked to do, in the order in which one attempt asks for it when nothing goes wrong."""

    TRAIN = 1
    SHARE = 2
    UPLOAD = 3
    CONFIRM = 4
    UNMASK = 5
    DECRYPT = 6
    FINALIZE = 7
    ATTEST = 8
    COMMITTED = 9
    ABORTED = 10
    BURNT = 11
    JOB_ENDED = 12


_OVER = frozenset({TaskKind.COMMITTED, TaskKind.ABORTED, TaskKind.BURNT, TaskKind.JOB_ENDED})


@dataclass(frozen=True, order=True)
class AttemptId:
    """One try at one round of one job; round and attempt count from 1."""

    job_id: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.job_id}/{self.round}/{self.attempt}"

    @property
    def ref(self) -> AttemptRef:
        """As signed statements name it."""
        return AttemptRef(job_id=self.job_id, round=self.round, attempt=self.attempt)


@dataclass(frozen=True)
class Contribution:
    """A hospital and the SHA-256 of its ciphertext in hex."""

    hospital_id: str
    ciphertext_sha256: str


@dataclass(frozen=True)
class Task:
    """Something to do in an attempt; it says all that is needed to do it. Fields as in the coordinator's proto."""

    kind: TaskKind
    attempt: AttemptId
    plan_id: str
    base_version: int
    base_state_sha256: str
    deadline: datetime | None
    group: tuple[str, ...]
    cohort: tuple[str, ...]
    contributions: tuple[Contribution, ...]
    sum_sha256: str
    finalizer: str
    next_state_sha256: str
    reason: str
    roster_sha256: str = ""
    epoch: int = 0
    adverts: tuple[Signed, ...] = ()
    shares: tuple[Signed, ...] = ()
    sharers: tuple[str, ...] = ()
    survivors: bytes = b""
    confirmations: Mapping[str, bytes] = field(default_factory=dict)
    opening: Opening = field(default_factory=lambda: Opening({}, {}))
    uploads: tuple[Signed, ...] = ()

    @property
    def rank(self) -> tuple[bool, int, int, bool]:
        """Orders the tasks of one job: a higher one makes every lower one pointless, of equals the later one counts.

        Within an attempt that runs the order of arrival counts and not the kind: after the centre lost its store it
        asks again for things that were done before. An attempt that is over stays over.
        """
        return self.kind is TaskKind.JOB_ENDED, self.attempt.round, self.attempt.attempt, self.kind in _OVER
