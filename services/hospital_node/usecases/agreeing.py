"""The steps of a round once the masks are off: check, open, agree, compute the next state."""

import asyncio
import json
import math
import random
from contextlib import closing
from typing import IO, Final

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Int64Vector, Seen, Trainer
from services.hospital_node.domain.sums import SumCheck
from services.hospital_node.domain.tasks import Task
from services.hospital_node.usecases.checking import CheckSteps
from services.hospital_node.usecases.jobs import OpenedSum, SealedState
from services.hospital_node.usecases.states import seal
from services.hospital_node.usecases.steps import Steps, Tools
from services.secure_sum.epoch import EpochKeys

log = get_logger(__name__)

# What messages say around a segment, however many parts it has: whose it is, and lengths.
_NAMES_BYTES: Final = 2048
# The aggregator must not know beforehand which segments will be looked at.
_CHOICE: Final = random.SystemRandom()


class AgreeSteps(Steps):
    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._checks = CheckSteps(tools)

    async def decrypt(self, task: Task) -> None:
        """Check and open the attempt's sum, compute and seal the next state, submit a keyed digest of the sum.

        The hospital that is expected to finalize stores the state before it says so: then a round of equal digests is
        committed at once. What it will say is durable before anything that follows from the sum leaves it.
        """
        opened = await self._opened(task)
        next_state = await self._next_state(task)
        await self._checks.note(task, opened.total)
        digest, signed = await self.sum(
            self._t.secure_sum.agree, opened.check, task.sum_sha256, opened.total, next_state.sha256
        )
        metrics = ""
        if task.finalizer == self._t.policy.hospital_id:
            metrics = await self._metrics(task)
            await self._store(task, next_state)
        seen = Seen(task.sum_sha256, digest, signed, next_state.sha256, metrics)
        await self._t.mesh.submit_digest(task.attempt, seen, self.patience(task))
        # It is likely to be committed; then it need not be downloaded.
        await self._t.states.keep(task.attempt.job_id, next_state)

    async def finalize(self, task: Task) -> None:
        """If this hospital is named: compute the next state, store it, tell the coordinator."""
        if task.finalizer != self._t.policy.hospital_id:
            return
        next_state = await self._next_state(task)
        metrics = await self._metrics(task)
        await self._store(task, next_state)
        await self._t.mesh.submit_state(task.attempt, next_state.sha256, metrics, self.patience(task))

    async def attest(self, task: Task) -> None:
        """Recompute the next state, compare it with the proposed one, agree or dispute."""
        if task.finalizer == self._t.policy.hospital_id:
            return
        own = await self._next_state(task)
        same = own.sha256 == task.next_state_sha256
        reason = "" if same else await self._compare(task, own.state)
        await self._t.mesh.attest(task.attempt, task.next_state_sha256, reason, self.patience(task))

    async def _store(self, task: Task, state: SealedState) -> None:
        await self._t.mesh.upload_blob(task.attempt.job_id, state.sha256, state.sealed, self.patience(task))

    async def _metrics(self, task: Task) -> str:
        accepted = await self.accepted(task)
        if task.attempt.round not in accepted.manifest.metrics_rounds:
            return ""
        opened = await self._opened(task)
        return metrics_json(await self.train((await self.trainer(task)).metrics, opened.total))

    async def _opened(self, task: Task) -> OpenedSum:
        """The attempt's plaintext sum.

        BFV is not CCA-secure: nothing is opened but a sum whose survivors t hospitals signed for, whose masks t of them
        took off, and of which this hospital has recomputed a part.
        """
        terms = await self.terms(task)

        async def make() -> OpenedSum:
            check = await self.sum(self._t.secure_sum.check, terms, task)
            with closing(self._t.spool()) as spool:
                return OpenedSum(check, await self._download_and_open(task, check, spool))

        return await self.session(task).opened.get((task.attempt, task.sum_sha256), make)

    async def _download_and_open(self, task: Task, check: SumCheck, spool: IO[bytes]) -> Int64Vector:
        layout = check.terms.layout
        chosen = sorted(_CHOICE.sample(range(layout.segments), min(self._t.segments, layout.segments)))
        download = self._t.mesh.download_sum(task.attempt, spool, layout.sum_bytes, self.patience(task))
        sha256, first = await asyncio.gather(download, self._segments(task, check, chosen[0]))
        if sha256 != task.sum_sha256:
            raise FedmeshError(Code.CIPHERTEXT_INVALID, "the encrypted sum does not have the announced SHA-256")
        for index in chosen:
            segments = first if index == chosen[0] else await self._segments(task, check, index)
            spool.seek(sum(layout.sum_segment_bytes(before) for before in range(index)))
            claimed = spool.read(layout.sum_segment_bytes(index))
            try:
                await self.sum(self._t.secure_sum.verify_segment, check, index, segments, claimed)
            except FedmeshError as error:
                log.error("sum_refused", attempt=str(task.attempt), segment=index, reason=error.message)
                raise
        return await self.sum(self._t.secure_sum.decrypt, check, spool)

    async def _segments(self, task: Task, check: SumCheck, index: int) -> dict[str, bytes]:
        """One segment of every other survivor's upload.

        Raises: FedmeshError(NOT_FOUND) when the aggregator has one of them no more.
        """
        terms = check.terms
        size = terms.roster.size * (terms.layout.upload_segment_bytes(index) + _NAMES_BYTES)
        # Perhaps with some whose uploads were counted but not listed.
        found = await self._t.mesh.get_segments(task.attempt, index, size, self.patience(task))
        lost = check.uploads.keys() - found.keys() - {self._t.policy.hospital_id}
        if lost:
            raise FedmeshError(Code.NOT_FOUND, f"segment {index} of {', '.join(sorted(lost))} is not to be had")
        return found

    async def _next_state(self, task: Task) -> SealedState:
        trainer = await self.trainer(task)
        opened = await self._opened(task)
        measuring = (await self.accepted(task)).manifest.measuring_round

        async def make() -> SealedState:
            base = await self.base_state(task)
            keys = opened.check.terms.keys
            if task.attempt.round == measuring:
                # It measured this very state, which is the next version's too.
                return seal(keys, task.attempt.job_id, task.attempt.round, base)
            return await self.train(_update, trainer, base, opened, keys, task)

        key = (task.attempt, task.sum_sha256, task.base_version, task.base_state_sha256)
        return await self.session(task).next_state.get(key, make)

    async def _compare(self, task: Task, own: bytes) -> str:
        accepted = await self.accepted(task)
        trainer = await self.trainer(task)
        try:
            proposed = await self._t.states.open_proposed(task, accepted.roster, self.patience(task))
            close = await self._t.worker.run(trainer.states_close, own, proposed)
        except FedmeshError as error:
            if error.retryable:
                raise
            return "the proposed state is not a state of this plan"
        return "" if close else "the proposed state differs from the recomputed one by more than float tolerance"


def _update(trainer: Trainer, base: bytes, opened: OpenedSum, keys: EpochKeys, task: Task) -> SealedState:
    state = trainer.update(base, opened.total, len(opened.check.uploads))
    return seal(keys, task.attempt.job_id, task.attempt.round, state)


def metrics_json(metrics: dict[str, float | None]) -> str:
    """Canonical JSON of the metrics that are numbers."""
    numbers = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
    return json.dumps(numbers, sort_keys=True, separators=(",", ":"), allow_nan=False)
