"""Taking a job: its plan, the checks, the data, the budget."""

import asyncio
import hashlib
from dataclasses import dataclass, field

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain import policy as rules
from services.hospital_node.domain.policy import Policy
from services.hospital_node.domain.ports import Int64Vector, Ledger, LocalJob, Mesh, Trainer, TrainerFactory, Worker
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.memo import Latest
from services.plans.manifest import PlanManifest, parse_manifest


class Verdict(Exception):
    """This hospital's own decision not to take part in a job, for a reason that it may tell."""

    def __init__(self, error: FedmeshError) -> None:
        super().__init__(str(error))
        self.error = error


def verdict_of(error: Exception) -> Verdict:
    """What a failure of this node's own plan, data or training means for the job: anything permanent ends it here."""
    if isinstance(error, FedmeshError):
        return Verdict(error)
    text = "this hospital's node failed while it trained; its log has the particulars"
    return Verdict(FedmeshError(Code.INTERNAL, text))


@dataclass
class JobSession:
    """What is kept in memory of one job."""

    plan: Latest[PlanManifest] = field(default_factory=Latest)
    local: Latest[Trainer] = field(default_factory=Latest)
    contribution: Latest[Int64Vector] = field(default_factory=Latest)
    total: Latest[Int64Vector] = field(default_factory=Latest)
    next_state: Latest[bytes] = field(default_factory=Latest)

    def close(self) -> None:
        for memo in (self.plan, self.local, self.contribution, self.total, self.next_state):
            memo.forget()


class Jobs:
    """The jobs that this node works on, at most `most`; the least recently used one is forgotten first."""

    def __init__(
        self, mesh: Mesh, ledger: Ledger, worker: Worker, trainers: TrainerFactory, policy: Policy, most: int
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._worker = worker
        self._trainers = trainers
        self._policy = policy
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

    async def plan(self, task: Task, patience_s: float) -> PlanManifest:
        """The job's plan, checked against its id, the registry's record of the job, and this hospital's policy.

        Raises: Verdict; FedmeshError from the registry.
        """
        terms = (task.plan_id, task.cohort)
        manifest = await self.session(task.attempt.job_id).plan.get(terms, lambda: self._fetch_plan(task, patience_s))
        if not 1 <= task.attempt.round <= manifest.rounds.count or task.base_version != task.attempt.round - 1:
            raise FedmeshError(
                Code.WRONG_STATE, f"the plan has no round {task.attempt.round} on version {task.base_version}"
            )
        return manifest

    async def trainer(self, task: Task, patience_s: float) -> Trainer:
        """The job's trainer; the budget is reserved and the data is the same as when the job was taken.

        Raises: Verdict; FedmeshError from the registry, STORE_FULL or STORE_UNAVAILABLE.
        """
        manifest = await self.plan(task, patience_s)
        session = self.session(task.attempt.job_id)
        return await session.local.get((task.plan_id, task.cohort), lambda: self._open(task, manifest))

    async def _fetch_plan(self, task: Task, patience_s: float) -> PlanManifest:
        content = await self._mesh.get_plan(task.plan_id, patience_s)
        job = await self._mesh.get_job(task.attempt.job_id, patience_s)
        try:
            if hashlib.sha256(content).hexdigest() != task.plan_id:
                raise FedmeshError(Code.PLAN_INVALID, "the registry's plan does not have the SHA-256 that names it")
            manifest = parse_manifest(content)
            rules.require_same_job(self._policy, task, job, manifest)
            rules.require_acceptable(self._policy, manifest, len(task.cohort))
        except FedmeshError as error:
            raise Verdict(error) from error
        return manifest

    async def _open(self, task: Task, manifest: PlanManifest) -> Trainer:
        try:
            local: LocalJob = await self._worker.run(self._trainers, manifest)
        except Exception as error:
            raise verdict_of(error) from error
        reservation = rules.reservation(self._policy, task, manifest, local.data_sha256)
        try:
            await asyncio.to_thread(self._ledger.reserve, reservation)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error
        return local.trainer
