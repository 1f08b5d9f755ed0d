"""Tasks as the node understands them, and their order."""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum


class TaskKind(IntEnum):
    """What a hospital is asked to do, in the order in which one attempt asks for it."""

    TRAIN = 1
    UPLOAD = 2
    DECRYPT = 3
    FINALIZE = 4
    ATTEST = 5
    COMMITTED = 6
    ABORTED = 7
    JOB_ENDED = 8


@dataclass(frozen=True, order=True)
class AttemptId:
    """One try at one round of one job; round and attempt count from 1."""

    job_id: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.job_id}/{self.round}/{self.attempt}"


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

    @property
    def rank(self) -> tuple[bool, int, int, int]:
        """Orders the tasks of one job: a higher one makes every lower one pointless."""
        return self.kind is TaskKind.JOB_ENDED, self.attempt.round, self.attempt.attempt, int(self.kind)
