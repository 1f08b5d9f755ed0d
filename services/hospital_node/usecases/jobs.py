"""Taking a job: its plan, the checks, the data, the budget."""

import hashlib
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain import policy as rules
from services.hospital_node.domain.policy import Policy
from services.hospital_node.domain.ports import (
    Int64Vector,
    Ledger,
    LocalJob,
    Mesh,
    Reservation,
    Trainer,
    TrainerFactory,
    Worker,
)
from services.hospital_node.domain.sums import SumCheck
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.memo import Latest
from services.hospital_node.usecases.releasing import release_ended
from services.hospital_node.usecases.rosters import Rosters
from services.hospital_node.usecases.trainings import Trainings
from services.plans.manifest import PlanManifest, parse_manifest
from services.secure_sum.roster import Roster

_ABOUT_DATA: Final = frozenset({Code.DATA_INVALID, Code.CONFIG_INVALID})
_DATA_REFUSED: Final = (
    "this hospital's data or its mapping does not fit the plan; its own log has the particulars, and `fedmesh hospital "
    "check-data` shows them there"
)


class Verdict(Exception):
    """This hospital's own decision not to take part in a job, for a reason that it may tell."""

    def __init__(self, error: FedmeshError, particulars: str = "") -> None:
        """`error` is told to the centre, `particulars` to this hospital's log only."""
        super().__init__(str(error))
        self.error = error
        self.particulars = particulars or error.message


def verdict_of(error: Exception) -> Verdict:
    """What a failure of this node's own plan, data or training means for the job: anything permanent ends it here."""
    if isinstance(error, FedmeshError):
        if error.code in _ABOUT_DATA:
            # Its text counts cells and names files: statistics that no noise covers. The code alone is told.
            return Verdict(FedmeshError(error.code, _DATA_REFUSED), error.message)
        return Verdict(error)
    text = "this hospital's node failed while it trained; its log has the particulars"
    return Verdict(FedmeshError(Code.INTERNAL, text))


@dataclass(frozen=True)
class Accepted:
    """What this hospital takes part in: a plan under a roster that it has verified."""

    manifest: PlanManifest
    roster: Roster


@dataclass(frozen=True)
class OpenedSum:
    """An attempt's plaintext sum, int64[vector_length], and what it was checked against."""

    check: SumCheck
    total: Int64Vector


@dataclass(frozen=True)
class SealedState:
    """A model state, as it is and sealed; `sha256` is the address of the sealed bytes."""

    state: bytes
    sealed: bytes
    sha256: str


@dataclass
class JobSession:
    """What is kept in memory of one job."""

    accepted: Latest[Accepted] = field(default_factory=Latest)
    local: Latest[Trainer] = field(default_factory=Latest)
    base: Latest[bytes] = field(default_factory=Latest)
    trainings: Trainings = field(default_factory=Trainings)
    opened: Latest[OpenedSum] = field(default_factory=Latest)
    next_state: Latest[SealedState] = field(default_factory=Latest)

    def close(self) -> None:
        for memo in (self.accepted, self.local, self.base, self.opened, self.next_state):
            memo.forget()
        self.trainings.forget()


class Jobs:
    """The jobs that this node works on, at most `most`; the least recently used one is forgotten first."""

    def __init__(
        self,
        mesh: Mesh,
        ledger: Ledger,
        worker: Worker,
        trainers: TrainerFactory,
        policy: Policy,
        rosters: Rosters,
        most: int,
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._worker = worker
        self._trainers = trainers
        self._policy = policy
        self._rosters = rosters
        self._most = most
        self._sessions: dict[str, JobSession] = {}

    def session(self, job_id: str) -> JobSession:
        session = self._sessions.pop(job_id, None) or JobSession()
        self._sessions[job_id] = session
        while len(self._sessions) > self._most:
            self._sessions.pop(next(iter(self._sessions))).close()
        return session

    def close(self, job_id: str) -> None:
        session = self._sessions.pop(job_id, None)
        if session is not None:
            session.close()

    async def accept(self, task: Task, patience_s: float) -> Accepted:
        """The job's plan and roster, checked against the plan's id, the registry's record of the job, the rosters that
        this hospital verified, and its policy.

        Raises: Verdict; FedmeshError from the registry.
        """
        accepted = await self.agreed(task, patience_s)
        if not 1 <= task.attempt.round <= accepted.manifest.rounds.count or task.base_version != task.attempt.round - 1:
            raise FedmeshError(
                Code.WRONG_STATE, f"the plan has no round {task.attempt.round} on version {task.base_version}"
            )
        return accepted

    async def agreed(self, task: Task, patience_s: float) -> Accepted:
        """As `accept`, whatever round the task is of. Raises: Verdict; FedmeshError from the registry."""
        terms = (task.plan_id, task.cohort, task.roster_sha256)
        session = self.session(task.attempt.job_id)
        return await session.accepted.get(terms, lambda: self._accept(task, patience_s))

    async def trainer(self, task: Task, patience_s: float) -> Trainer:
        """The job's trainer; the budget is reserved and the data is the same as when the job was taken.

        Raises: Verdict; FedmeshError from the registry, STORE_FULL or STORE_UNAVAILABLE.
        """
        accepted = await self.accept(task, patience_s)
        session = self.session(task.attempt.job_id)
        key = (task.plan_id, task.cohort, task.roster_sha256)
        return await session.local.get(key, lambda: self._open(task, accepted, patience_s))

    async def local(self, task: Task, accepted: Accepted) -> Trainer:
        """The trainer of a job that has ended, for what stays in this hospital: no budget is reserved for it.

        Raises: Verdict.
        """
        session = self.session(task.attempt.job_id)
        key = (task.plan_id, task.cohort, task.roster_sha256)
        return await session.local.get(key, lambda: self._opened(accepted))

    async def _accept(self, task: Task, patience_s: float) -> Accepted:
        content = await self._mesh.get_plan(task.plan_id, patience_s)
        job = await self._mesh.get_job(task.attempt.job_id, patience_s)
        try:
            if hashlib.sha256(content).hexdigest() != task.plan_id:
                raise FedmeshError(Code.PLAN_INVALID, "the registry's plan does not have the SHA-256 that names it")
            manifest = parse_manifest(content)
            rules.require_same_job(self._policy, task, job, manifest)
            # Also when the job's roster is known: the newest one may be of today.
            await self._rosters.refresh(patience_s)
            roster = await self._rosters.get(task.roster_sha256, patience_s)
            rules.require_members(task, roster, self._rosters.newest)
            rules.require_acceptable(self._policy, manifest, roster.size)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error
        return Accepted(manifest, roster)

    async def _open(self, task: Task, accepted: Accepted, patience_s: float) -> Trainer:
        local = await self._read(accepted)
        reservation = rules.reservation(self._policy, task, accepted.manifest, local, accepted.roster)
        try:
            await self._reserve(reservation, patience_s)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error
        return local.trainer

    async def _reserve(self, reservation: Reservation, patience_s: float) -> None:
        """Set budget aside; before it is refused, jobs that are over unknown to this hospital give theirs back."""
        try:
            await on_disk(self._ledger.reserve, reservation)
        except FedmeshError as error:
            if error.code is not Code.BUDGET_EXHAUSTED:
                raise
            if not await release_ended(self._ledger, self._mesh, patience_s):
                raise
            await on_disk(self._ledger.reserve, reservation)

    async def _opened(self, accepted: Accepted) -> Trainer:
        return (await self._read(accepted)).trainer

    async def _read(self, accepted: Accepted) -> LocalJob:
        try:
            return await self._worker.run(self._trainers, accepted.manifest)
        except Exception as error:
            # The hospital's own database may be away for a while: that is no verdict.
            if isinstance(error, FedmeshError) and error.retryable:
                raise
            raise verdict_of(error) from error
