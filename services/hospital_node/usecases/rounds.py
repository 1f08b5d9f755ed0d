"""The steps of a round, one method for each kind of task.

Every step may be repeated and needs no step before it in memory: it makes what is missing. What must survive a crash is
durable before anything that depends on it leaves the hospital.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain import policy as rules
from services.hospital_node.domain.policy import Policy
from services.hospital_node.domain.ports import (
    Int64Vector,
    Ledger,
    Mesh,
    NodeState,
    NoiseAdder,
    NoiseRequest,
    SecretSum,
    Trainer,
    Worker,
)
from services.hospital_node.domain.tasks import Task, TaskKind
from services.hospital_node.usecases.jobs import Jobs, Verdict, verdict_of
from services.plans.manifest import PlanManifest

P = ParamSpec("P")
T = TypeVar("T")
log = get_logger(__name__)

# Bounds of the patience with a service that is away: the deadline is the coordinator's, and clocks differ.
_LEAST_PATIENCE_S: Final = 5.0
_MOST_PATIENCE_S: Final = 600.0


@dataclass(frozen=True)
class Tools:
    """What the steps work with."""

    mesh: Mesh
    ledger: Ledger
    state: NodeState
    worker: Worker
    secret_sum: SecretSum
    noise: NoiseAdder
    jobs: Jobs
    policy: Policy
    clock: Clock


class RoundSteps:
    def __init__(self, tools: Tools) -> None:
        self._t = tools
        self._steps = {
            TaskKind.TRAIN: self.train,
            TaskKind.UPLOAD: self.upload,
            TaskKind.DECRYPT: self.decrypt,
            TaskKind.FINALIZE: self.finalize,
            TaskKind.ATTEST: self.attest,
            TaskKind.COMMITTED: self.committed,
            TaskKind.ABORTED: self.aborted,
            TaskKind.JOB_ENDED: self.job_ended,
        }

    async def perform(self, task: Task) -> None:
        """Do a task.

        Raises: Verdict when the hospital will not take part in the job; FedmeshError when this task cannot be done.
        """
        await self._steps[task.kind](task)

    async def train(self, task: Task) -> None:
        """Take the job if it is new, train on the base version, keep the ciphertext ready, report ready.

        The ciphertext is made now, when nobody waits yet, and not between the sealing of the group and the upload. If
        the group is sealed without this hospital, nobody ever sees it, and nothing is charged.
        """
        manifest = await self._plan(task)
        await self._contribution(task, manifest)
        await self._room(task, manifest)
        await self._ciphertext(task, manifest)
        await self._t.mesh.report_ready(task.attempt, task.base_version, self._patience(task))

    async def upload(self, task: Task) -> None:
        """Keep the ciphertext, then mark the attempt as spent, then send: in this order, each durable before the next.

        A crash between the first two leaves a ciphertext that nobody saw; after the second, the same bytes are sent
        again. A charged attempt whose bytes are gone is not answered: other bytes would be a second release.
        """
        rules.require_group(self._t.policy, task)
        manifest = await self._plan(task)
        ciphertext = await self._ciphertext(task, manifest)
        await self._charge(task, manifest)
        sha256 = hashlib.sha256(ciphertext).hexdigest()
        await self._t.mesh.upload(task.attempt, manifest, sha256, ciphertext, self._patience(task))
        await self._t.mesh.report_upload(task.attempt, sha256, len(ciphertext), self._patience(task))

    async def decrypt(self, task: Task) -> None:
        """Decrypt the attempt's one sum and submit its keyed digest."""
        total = await self._total(task)
        digest = await self._t.worker.run(self._t.secret_sum.digest, task.attempt, task.sum_sha256, total)
        await self._t.mesh.submit_digest(task.attempt, task.sum_sha256, digest, self._patience(task))

    async def finalize(self, task: Task) -> None:
        """If this hospital is named: compute the next state, store it, tell the coordinator."""
        if task.finalizer != self._t.policy.hospital_id:
            return
        manifest = await self._plan(task)
        state = await self._next_state(task, manifest)
        metrics = ""
        if task.attempt.round in manifest.metrics_rounds:
            trainer = await self._t.jobs.trainer(task, self._patience(task))
            metrics = metrics_json(await self._train(trainer.metrics, await self._total(task)))
        sha256 = await asyncio.to_thread(self._t.state.save_blob, task.attempt.job_id, state)
        await self._t.mesh.upload_blob(task.attempt.job_id, sha256, state, self._patience(task))
        await self._t.mesh.submit_state(task.attempt, sha256, metrics, self._patience(task))

    async def attest(self, task: Task) -> None:
        """Recompute the next state, compare it with the proposed one, agree or dispute."""
        if task.finalizer == self._t.policy.hospital_id:
            return
        manifest = await self._plan(task)
        own = await self._next_state(task, manifest)
        same = hashlib.sha256(own).hexdigest() == task.next_state_sha256
        reason = "" if same else await self._compare(task, own, await self._blob(task, task.next_state_sha256))
        await self._t.mesh.attest(task.attempt, task.next_state_sha256, reason, self._patience(task))
        if same:
            # Likely to be committed; then it need not be downloaded.
            await asyncio.to_thread(self._t.state.save_blob, task.attempt.job_id, own)

    async def committed(self, task: Task) -> None:
        """Adopt the committed state, byte for byte, and let go of what led to it."""
        await asyncio.to_thread(self._t.state.finish_before, task.attempt, inclusive=True)
        await self._adopt(task, task.next_state_sha256)

    async def aborted(self, task: Task) -> None:
        """Delete the attempt's ciphertext. What was charged stays spent: the sum may have been opened."""
        await asyncio.to_thread(self._t.state.finish_before, task.attempt, inclusive=True)
        log.info("attempt_aborted", attempt=str(task.attempt), reason=task.reason)

    async def job_ended(self, task: Task) -> None:
        """Forget the job; its budget is free again only if nothing was ever sent."""
        job_id = task.attempt.job_id
        self._t.jobs.close(job_id)
        await asyncio.to_thread(self._t.state.finish_job, job_id)
        released = await asyncio.to_thread(self._t.ledger.release, job_id)
        log.info("job_ended", job_id=job_id, reason=task.reason, budget_released=released)
        if task.base_state_sha256:
            # The end may overtake the last version's own task.
            await self._adopt(task, task.base_state_sha256)

    async def _adopt(self, task: Task, sha256: str) -> None:
        job_id = task.attempt.job_id
        await self._blob(task, sha256)
        await asyncio.to_thread(self._t.state.adopt, job_id, task.base_version, sha256)
        log.info("version_adopted", job_id=job_id, version=task.base_version, state=sha256)

    def _patience(self, task: Task) -> float:
        if task.deadline is None:
            return _LEAST_PATIENCE_S
        left = (task.deadline - self._t.clock.now()).total_seconds()
        return min(max(left, _LEAST_PATIENCE_S), _MOST_PATIENCE_S)

    async def _plan(self, task: Task) -> PlanManifest:
        return await self._t.jobs.plan(task, self._patience(task))

    async def _room(self, task: Task, manifest: PlanManifest) -> None:
        measured = task.attempt.round in manifest.metrics_rounds
        try:
            await asyncio.to_thread(self._t.ledger.require_room, task.attempt, measured=measured)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error

    async def _charge(self, task: Task, manifest: PlanManifest) -> None:
        measured = task.attempt.round in manifest.metrics_rounds
        try:
            await asyncio.to_thread(self._t.ledger.charge, task.attempt, measured=measured)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error

    async def _contribution(self, task: Task, manifest: PlanManifest) -> Int64Vector:
        trainer = await self._t.jobs.trainer(task, self._patience(task))
        key = (task.attempt.round, task.base_version, task.base_state_sha256)

        async def make() -> Int64Vector:
            base = await self._base_state(task, trainer)
            if task.base_state_sha256:
                # A hospital that was away learns of the committed version by the next task.
                await asyncio.to_thread(
                    self._t.state.adopt, task.attempt.job_id, task.base_version, task.base_state_sha256
                )
            return await self._train(trainer.contribution, base, task.attempt.round)

        return await self._t.jobs.session(task.attempt.job_id).contribution.get(key, make)

    async def _ciphertext(self, task: Task, manifest: PlanManifest) -> bytes:
        """The attempt's one ciphertext: the kept one, or a new one, which is durable before this returns."""
        kept = await asyncio.to_thread(self._t.state.ciphertext, task.attempt)
        if kept is not None:
            return kept
        if await asyncio.to_thread(self._t.ledger.charged, task.attempt):
            raise FedmeshError(
                Code.WRONG_STATE,
                "the ciphertext of this attempt was sent before and is lost: nothing is sent again",
            )
        values = await self._contribution(task, manifest)
        noised = await self._train(self._t.noise.add, values, _noise_request(task, manifest))
        ciphertext = await self._train(self._t.secret_sum.encrypt, noised, manifest)
        await asyncio.to_thread(self._t.state.save_ciphertext, task.attempt, ciphertext)
        return ciphertext

    async def _train(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a slow step of this node's own; a failure is a verdict."""
        try:
            return await self._t.worker.run(function, *args, **kwargs)
        except Exception as error:
            if not isinstance(error, FedmeshError):
                log.error("training_failed", exc_info=error)
            raise verdict_of(error) from error

    async def _base_state(self, task: Task, trainer: Trainer) -> bytes:
        if not task.base_state_sha256:
            if task.base_version != 0:
                raise FedmeshError(Code.WRONG_STATE, f"version {task.base_version} has no state")
            return await self._t.worker.run(trainer.initial_state)
        return await self._blob(task, task.base_state_sha256)

    async def _blob(self, task: Task, sha256: str) -> bytes:
        """A state by its hash: this node's copy, else the registry's."""
        content = await asyncio.to_thread(self._t.state.blob, sha256)
        if content is None:
            content = await self._t.mesh.download_blob(sha256, self._patience(task))
            if hashlib.sha256(content).hexdigest() != sha256:
                raise FedmeshError(Code.INTERNAL, f"the registry sent a state that does not have the SHA-256 {sha256}")
        await asyncio.to_thread(self._t.state.save_blob, task.attempt.job_id, content)
        return content

    async def _total(self, task: Task) -> Int64Vector:
        """The attempt's plaintext sum. BFV is not CCA-secure: nothing but the one sum of an attempt is decrypted."""
        manifest = await self._plan(task)
        rules.require_group(self._t.policy, task)
        record = await asyncio.to_thread(self._t.state.record, task.attempt)
        rules.require_sum(self._t.policy, task, record.ciphertext_sha256)

        async def make() -> Int64Vector:
            await asyncio.to_thread(self._t.state.pin_sum, task.attempt, task.sum_sha256)
            size = self._t.secret_sum.size(manifest)
            content = await self._t.mesh.download_sum(task.attempt, size, self._patience(task))
            if hashlib.sha256(content).hexdigest() != task.sum_sha256:
                raise FedmeshError(Code.CIPHERTEXT_INVALID, "the encrypted sum does not have the announced SHA-256")
            return await self._t.worker.run(self._t.secret_sum.decrypt, content, manifest, len(task.contributions))

        key = (task.attempt, task.sum_sha256)
        return await self._t.jobs.session(task.attempt.job_id).total.get(key, make)

    async def _next_state(self, task: Task, manifest: PlanManifest) -> bytes:
        trainer = await self._t.jobs.trainer(task, self._patience(task))
        total = await self._total(task)

        async def make() -> bytes:
            base = await self._base_state(task, trainer)
            return await self._train(trainer.update, base, total, len(task.contributions))

        key = (task.attempt, task.sum_sha256, task.base_state_sha256)
        return await self._t.jobs.session(task.attempt.job_id).next_state.get(key, make)

    async def _compare(self, task: Task, own: bytes, proposed: bytes) -> str:
        trainer = await self._t.jobs.trainer(task, self._patience(task))
        try:
            close = await self._t.worker.run(trainer.states_close, own, proposed)
        except FedmeshError:
            return "the proposed state is not a state of this plan"
        return "" if close else "the proposed state differs from the recomputed one by more than float tolerance"


def _noise_request(task: Task, manifest: PlanManifest) -> NoiseRequest:
    return NoiseRequest(manifest, task.attempt.round, len(task.cohort))


def metrics_json(metrics: dict[str, float | None]) -> str:
    """Canonical JSON of the metrics that are numbers."""
    numbers = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
    return json.dumps(numbers, sort_keys=True, separators=(",", ":"), allow_nan=False)
