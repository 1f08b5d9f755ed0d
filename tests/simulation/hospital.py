"""An honest hospital: the real `Member` on a disk that survives crashes, and the rules that a node adds to it."""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from services.common.errors import Code, FedmeshError
from services.secure_sum import opening
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import AttemptRef, Signed
from tests.simulation.arithmetic import Arithmetic, Integers, Segments, segment_hashes, sha256
from tests.simulation.messages import Answer, Step, Task

DIGEST_KEY = b"stands for the group key"


@dataclass(frozen=True)
class Record:
    """One attempt, as it lies on disk."""

    state: bytes
    values: Integers
    prepared: Segments
    ciphertext: Segments = ()
    result: Integers = ()


@dataclass(frozen=True)
class Outcome:
    """What a task led to: make `record` durable, then send `answer`."""

    record: Record
    state: MemberState
    answer: Answer


class Busy(Exception):
    """Nothing to answer yet, or any more."""


class Hospital:
    """Calls the protocol as docs/secure-sum.md says and keeps what it must keep.

    A step is `work` (nothing has happened yet), `save` (durable), and then sending the answer: the simulation can crash
    the hospital between any two.
    """

    member_type: type[Member] = Member

    def __init__(
        self, keys: MemberKeys, roster: Roster, arithmetic: Arithmetic, draw: Callable[[AttemptRef], Integers]
    ) -> None:
        self.id = keys.hospital_id
        self.disk: dict[AttemptRef, Record] = {}
        self.alive = True
        self._keys = keys
        self._rosters: dict[str, Roster] = {}
        self.adopt(roster)
        self._arithmetic = arithmetic
        self._draw = draw
        self._memory: dict[AttemptRef, MemberState] = {}

    def adopt(self, roster: Roster) -> None:
        """Take part in attempts of this (verified) roster from now on; earlier attempts keep theirs."""
        self.roster = roster
        self._rosters[roster.sha256] = roster

    def member(self, state: MemberState | None = None) -> Member:
        """The protocol under the present roster, or the one of an attempt."""
        return self.member_type(self._keys, self._rosters[state.roster] if state else self.roster)

    def crash(self) -> None:
        """Lose everything that is not on disk."""
        self.alive = False
        self._memory.clear()

    def restart(self) -> None:
        self.alive = True

    def state(self, attempt: AttemptRef) -> MemberState:
        """The state of an attempt, from memory or else from disk.

        Raises:
            FedmeshError: WRONG_STATE if the hospital knows nothing of the attempt.
        """
        if attempt not in self.disk:
            raise FedmeshError(Code.WRONG_STATE, "no state of this attempt: drop out of it")
        if attempt not in self._memory:
            self._memory[attempt] = MemberState.from_json(self.disk[attempt].state)
        return self._memory[attempt]

    def perform(self, task: Task) -> Answer:
        """`work` and `save` in one: a step without a crash."""
        outcome = self.work(task)
        self.save(outcome)
        return outcome.answer

    def save(self, outcome: Outcome) -> None:
        self.disk[outcome.answer.attempt] = outcome.record
        self._memory[outcome.answer.attempt] = outcome.state

    def work(self, task: Task) -> Outcome:
        """Compute a step.

        Raises:
            FedmeshError: the task is refused.
            Busy: there is no answer to it now.
        """
        return {
            Step.TRAIN: self._train,
            Step.SHARE: self._share,
            Step.UPLOAD: self._upload,
            Step.CONFIRM: self._confirm,
            Step.UNMASK: self._unmask,
            Step.AGREE: self._agree,
        }[task.step](task)

    def _train(self, task: Task) -> Outcome:
        if task.attempt in self.disk:
            state, record = self.state(task.attempt), self.disk[task.attempt]
        else:
            state = self.member().begin(task.attempt, task.epoch, task.cohort)
            record = Record(b"", self._draw(task.attempt), self._arithmetic.prepare())
        return self._outcome(task, record, state, signed=(state.advert,))

    def _share(self, task: Task) -> Outcome:
        state = self.state(task.attempt)
        state = self.member(state).share(state, task.adverts, task.oldest)
        return self._outcome(task, self.disk[task.attempt], state, signed=state.shares_out)

    def _upload(self, task: Task) -> Outcome:
        state, record = self.state(task.attempt), self.disk[task.attempt]
        member = self.member(state)
        state = member.receive(state, task.sharers, task.shares)
        if state.upload is None:
            ciphertext = self._arithmetic.protect(record.prepared, record.values, member.mask_plan(state))
            record = replace(record, ciphertext=ciphertext)
            state = member.commit(
                state,
                self._arithmetic.parameter_set,
                self._arithmetic.lanes,
                self._arithmetic.length,
                sha256(ciphertext),
                segment_hashes(ciphertext),
            )
        return self._outcome(task, record, state, signed=(_made(state.upload),), ciphertext=record.ciphertext)

    def _confirm(self, task: Task) -> Outcome:
        state = self.state(task.attempt)
        state = self.member(state).confirm(state, task.survivors)
        return self._outcome(task, self.disk[task.attempt], state, signature=state.confirmation)

    def _unmask(self, task: Task) -> Outcome:
        state = self._revealed(task)
        return self._outcome(task, self.disk[task.attempt], state, signed=(_made(state.reveal),))

    def _revealed(self, task: Task) -> MemberState:
        state = self.state(task.attempt)
        member = self.member(state)
        return member.reveal(
            member.confirm(state, task.survivors), task.confirmations, self.other_attempts(task.attempt)
        )

    def other_attempts(self, attempt: AttemptRef) -> list[MemberState]:
        """Everything that is remembered of other attempts: a hospital reveals in one attempt of a round only."""
        return [self.state(other) for other in self.disk if other != attempt]

    def _agree(self, task: Task) -> Outcome:
        state = self._revealed(task)
        if state.digest is None:
            self.check_sum(state, task)
        result = self._arithmetic.open(task.total)
        plaintext = repr((task.attempt, result)).encode()
        digest = hmac.digest(DIGEST_KEY, plaintext, "sha256")
        state = self.member(state).agree(state, sha256(task.total), digest, hashlib.sha256(plaintext).hexdigest())
        record = replace(self.disk[task.attempt], result=result)
        return self._outcome(task, record, state, signed=(_made(state.digest),))

    def check_sum(self, state: MemberState, task: Task) -> None:
        """Recompute the whole sum (a node: random segments) from the signed uploads and the opened seeds.

        Raises:
            FedmeshError: the aggregator or the coordinator lied.
        """
        roster = self._rosters[state.roster]
        listed = opening.check_listed(state.survivors, roster, task.uploads)
        if task.opening is None:
            raise FedmeshError(Code.STATEMENT_INVALID, "no opening")
        for hospital, upload in listed.items():
            if sha256(task.ciphertexts[hospital]) != upload.ciphertext_sha256:
                raise FedmeshError(Code.CIPHERTEXT_INVALID, "a ciphertext is not what its hospital committed to")
        keys = opening.mask_keys(state.adverts, roster, state.sharers)
        plan = opening.correction(task.attempt, keys, sorted(listed), task.opening)
        if self._arithmetic.total([task.ciphertexts[h] for h in sorted(listed)], plan) != task.total:
            raise FedmeshError(Code.CIPHERTEXT_INVALID, "the aggregator's sum is wrong", culprit="aggregator")

    def _outcome(
        self,
        task: Task,
        record: Record,
        state: MemberState,
        signed: tuple[Signed, ...] = (),
        ciphertext: Segments = (),
        signature: bytes = b"",
    ) -> Outcome:
        answer = Answer(self.id, task.step, task.attempt, signed, ciphertext, signature)
        return Outcome(replace(record, state=state.to_json()), state, answer)


def _made(signed: Signed | None) -> Signed:
    assert signed is not None
    return signed


def inputs(hospitals: Mapping[str, Hospital], attempt: AttemptRef) -> dict[str, Integers]:
    """What every hospital put into an attempt: only the test may look."""
    return {name: h.disk[attempt].values for name, h in hospitals.items() if attempt in h.disk}
