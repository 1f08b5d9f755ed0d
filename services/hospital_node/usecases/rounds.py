"""The steps of a round up to the opening of the sum, one method for each kind of task.

What must survive a crash is durable before anything that depends on it leaves the hospital. After the group is sealed
everybody waits for everybody: whatever is slow comes before that.
"""

import asyncio

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import require_recent
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.domain.staleness import Trained, contribution, training_round
from services.hospital_node.domain.sums import SumTerms
from services.hospital_node.domain.tasks import Task, TaskKind
from services.hospital_node.usecases.agreeing import AgreeSteps
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.ending import EndSteps
from services.hospital_node.usecases.jobs import Accepted, Verdict
from services.hospital_node.usecases.steps import Steps, Tools
from services.plans.manifest import PlanManifest
from services.secure_sum.statements import Advert, Signed, parse


class RoundSteps(Steps):
    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        agreeing, ending = AgreeSteps(tools), EndSteps(tools)
        self._steps = {
            TaskKind.TRAIN: self.train_and_advertise,
            TaskKind.SHARE: self.share,
            TaskKind.UPLOAD: self.upload,
            TaskKind.CONFIRM: self.confirm,
            TaskKind.UNMASK: self.unmask,
            TaskKind.DECRYPT: agreeing.decrypt,
            TaskKind.FINALIZE: agreeing.finalize,
            TaskKind.ATTEST: agreeing.attest,
            TaskKind.COMMITTED: ending.committed,
            TaskKind.ABORTED: ending.aborted,
            TaskKind.BURNT: ending.burnt,
            TaskKind.JOB_ENDED: ending.job_ended,
        }

    async def perform(self, task: Task) -> None:
        """Do a task.

        Raises: Verdict when the hospital will not take part in the job; FedmeshError when this task cannot be done.
        """
        await self._steps[task.kind](task)

    async def train_and_advertise(self, task: Task) -> None:
        """Take the job if it is new, train on the base version, keep the ciphertext ready, report ready.

        The ciphertext is made now, when nobody waits yet, and not between the sealing of the group and the upload. If
        the group is sealed without this hospital, nobody ever sees it, and nothing is charged.
        """
        accepted = await self.accepted(task)
        terms = await self.terms(task)
        require_recent(task, self._t.clock.now())
        # Before the job is entered into the ledger: an old copy of it must not grow.
        await self._same_ledger(task)
        await self.trainer(task)
        await self._room(task, accepted.manifest)
        advert = await self._advert(task, accepted, terms)
        trained_on = task.base_version - parse(Advert, advert.statement).age
        await self._t.mesh.report_ready(task.attempt, trained_on, advert, self.patience(task))
        self._t.spending.changed()

    async def share(self, task: Task) -> None:
        """Share the mask secrets among the sealed group."""
        shares = await self.sum(self._t.secure_sum.share, await self.terms(task), task.adverts)
        await self._t.mesh.submit_shares(task.attempt, shares, self.patience(task))

    async def upload(self, task: Task) -> None:
        """Mask the ciphertext, keep it and mark the attempt as spent, then send: both are durable before a byte leaves.

        A crash before that leaves a ciphertext that nobody saw; after it, the same bytes are sent again. An attempt
        whose bytes are gone is not answered: other bytes would be a second release.
        """
        require_recent(task, self._t.clock.now())
        accepted = await self.accepted(task)
        secure_sum = self._t.secure_sum
        upload = await self.sum(secure_sum.mask, await self.terms(task), task.sharers, task.shares)
        await self._room(task, accepted.manifest)
        # Two files on one disk: one wait for both.
        await asyncio.gather(self.sum(secure_sum.keep, upload), self._charge(task, accepted.manifest))
        await self._t.mesh.upload(upload, self.patience(task))
        await self._t.mesh.report_upload(upload, self.patience(task))
        await self.sum(secure_sum.settle, upload)

    async def confirm(self, task: Task) -> None:
        """Sign the list of survivors."""
        signature = await self.sum(self._t.secure_sum.confirm, await self.terms(task), task.survivors)
        await self._t.mesh.confirm(task.attempt, task.survivors, signature, self.patience(task))

    async def unmask(self, task: Task) -> None:
        """Reveal what takes the masks off the sum over the confirmed survivors, and off nothing else."""
        reveal = await self.sum(self._t.secure_sum.reveal, await self.terms(task), task.survivors, task.confirmations)
        await self._t.mesh.submit_reveal(task.attempt, reveal, self.patience(task))

    async def _advert(self, task: Task, accepted: Accepted, terms: SumTerms) -> Signed:
        """The attempt's one advert: the kept one, or a new one with its ciphertext, durable before this returns."""
        kept = await self.sum(self._t.secure_sum.advert, terms)
        if kept is not None:
            return kept
        if await on_disk(self._t.ledger.charged, task.attempt):
            raise FedmeshError(
                Code.WRONG_STATE,
                "the ciphertext of this attempt was sent before and is lost: nothing is sent again",
            )
        manifest = accepted.manifest
        trained = await self._trained(task, manifest)
        age = trained.age(task)
        noised = await self.train(self._noised, manifest, trained, age, task.attempt.round, accepted.roster.size)
        # Before anything of the attempt is kept: from here on the result may have gone into its round.
        trained.attempts.add(task.attempt)
        try:
            return await self.sum(self._t.secure_sum.begin, terms, noised, age)
        except FedmeshError as error:
            raise Verdict(error) if error.code is Code.PLAN_INVALID else error from error

    def _noised(
        self, manifest: PlanManifest, trained: Trained, age: int, round_number: int, hospitals: int
    ) -> Int64Vector:
        values = contribution(manifest, trained, age, round_number)
        return self._t.noise.add(values, NoiseRequest(manifest, round_number, hospitals))

    async def _trained(self, task: Task, manifest: PlanManifest) -> Trained:
        """A training result that may go into the task's round, at most as old as the plan allows."""
        trainer = await self.trainer(task)
        told = training_round(manifest, task.attempt)

        async def make() -> Trained:
            values = await self.train(trainer.contribution, await self.base_state(task), told)
            return Trained(task.base_version, values)

        async def used(trained: Trained) -> bool:
            return await self._used(task, trained)

        return await self.session(task).trainings.get(task, manifest.rounds.oldest, make, used)

    async def _used(self, task: Task, trained: Trained) -> bool:
        """Whether a result may have left for another version. Where it has not, it never will: the ciphertexts that
        were made of it are deleted before it goes into this one.
        """
        elsewhere = trained.elsewhere(task.attempt)
        for attempt in elsewhere:
            if await on_disk(self._t.ledger.charged, attempt):
                return True
        if elsewhere:
            await self.sum(self._t.secure_sum.finish, elsewhere[-1])
            trained.attempts.difference_update(elsewhere)
        return False

    async def _same_ledger(self, task: Task) -> None:
        try:
            await self._t.spending.require_same(self.patience(task))
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error

    async def _room(self, task: Task, manifest: PlanManifest) -> None:
        measured = task.attempt.round in manifest.metrics_rounds
        try:
            await on_disk(self._t.ledger.require_room, task.attempt, measured=measured)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error

    async def _charge(self, task: Task, manifest: PlanManifest) -> None:
        measured = task.attempt.round in manifest.metrics_rounds
        try:
            await on_disk(self._t.ledger.charge, task.attempt, measured=measured)
        except FedmeshError as error:
            raise error if error.retryable else Verdict(error) from error
        self._t.spending.changed()
