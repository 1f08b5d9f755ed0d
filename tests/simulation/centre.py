"""An honest centre: a registry that keeps what it stored, and a coordinator that can lose its memory at any time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.errors import Code, FedmeshError
from services.secure_sum import opening, statements
from services.secure_sum.opening import Opening
from services.secure_sum.roster import Roster
from services.secure_sum.statements import AttemptRef, Digest, Signed
from tests.simulation.arithmetic import Arithmetic, Segments, sha256
from tests.simulation.messages import Answer, Step, Task


@dataclass(frozen=True)
class Stored:
    """Confirmed survivors with what it takes to go on after the coordinator's memory was lost."""

    attempt: AttemptRef
    survivors: bytes
    confirmations: Mapping[str, bytes]
    adverts: tuple[Signed, ...]
    sharers: tuple[str, ...]
    shares: Mapping[str, tuple[Signed, ...]]
    uploads: Mapping[str, Signed]


@dataclass(frozen=True)
class Closed:
    """How a round ended."""

    stored: Stored
    total: Segments | None
    """None: burnt."""


class Registry:
    """Durable. The first list of a round stands, and from then on no other attempt at the round is opened."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.round = 1
        self.attempts = 0
        self.stored: Stored | None = None
        self.closed: dict[int, Closed] = {}

    def open_attempt(self) -> AttemptRef:
        if self.stored is not None:
            raise FedmeshError(Code.WRONG_STATE, "the survivors of this round are stored")
        self.attempts += 1
        return AttemptRef(job_id=self.job_id, round=self.round, attempt=self.attempts)

    def store_survivors(self, stored: Stored) -> None:
        if stored.attempt.round != self.round:
            raise FedmeshError(Code.WRONG_STATE, "the round is closed")
        if self.stored is None:
            self.stored = stored
        elif self.stored.survivors != stored.survivors:
            raise FedmeshError(Code.LOST_RACE, "other survivors are stored for this round")

    def close(self, stored: Stored, total: Segments | None) -> None:
        """Commit the sum, or burn the version. The first word on a round stands."""
        if self.stored is None or self.stored.survivors != stored.survivors:
            raise FedmeshError(Code.WRONG_STATE, "these are not the stored survivors of the open round")
        self.closed[self.round] = Closed(stored, total)
        self.round, self.attempts, self.stored = self.round + 1, 0, None


@dataclass
class Running:
    """The coordinator's memory of one attempt."""

    attempt: AttemptRef
    step: Step = Step.TRAIN
    adverts: dict[str, Signed] = field(default_factory=dict)
    sealed: tuple[Signed, ...] = ()
    shares: dict[str, tuple[Signed, ...]] = field(default_factory=dict)
    sharers: tuple[str, ...] = ()
    uploads: dict[str, Signed] = field(default_factory=dict)
    survivors: bytes = b""
    listed: tuple[str, ...] = ()
    confirmations: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Signed] = field(default_factory=dict)
    opening: Opening | None = None
    total: Segments = ()
    digests: dict[str, Digest] = field(default_factory=dict)
    stored: Stored | None = None


Ciphertexts = dict[tuple[AttemptRef, str], Segments]


class Coordinator:
    """Leads one round at a time. `patient` waits for everybody where t would do.

    enough: so many ready hospitals seal an asynchronous group, 0 for all; oldest: the greatest age of a contribution.
    """

    def __init__(
        self,
        registry: Registry,
        ciphertexts: Ciphertexts,
        roster: Roster,
        arithmetic: Arithmetic,
        patient: bool,
        enough: int = 0,
        oldest: int = 0,
    ) -> None:
        self._enough = enough
        self._oldest = oldest
        self.blamed: list[tuple[str, FedmeshError]] = []
        self.aborted: list[AttemptRef] = []
        self._registry = registry
        self._ciphertexts = ciphertexts
        self.roster = roster
        self._arithmetic = arithmetic
        self._patient = patient
        self.run = self._begin()

    @property
    def epoch(self) -> int:
        """Every round has a key epoch of its own here."""
        return self.run.attempt.round

    def _begin(self) -> Running:
        """A new attempt, or the one whose survivors are stored."""
        stored = self._registry.stored
        if stored is None:
            return Running(self._registry.open_attempt())
        return Running(
            stored.attempt,
            Step.UNMASK,
            sealed=stored.adverts,
            shares=dict(stored.shares),
            sharers=stored.sharers,
            uploads=dict(stored.uploads),
            survivors=stored.survivors,
            listed=tuple(sorted(stored.uploads)),
            confirmations=dict(stored.confirmations),
            stored=stored,
        )

    def tasks(self) -> dict[str, Task]:
        """What is outstanding now, by hospital."""
        run = self.run
        waiting = {
            Step.TRAIN: set(self.roster.ids) - set(run.adverts),
            Step.SHARE: {s.hospital_id for s in run.sealed} - set(run.shares),
            Step.UPLOAD: set(run.sharers) - set(run.uploads),
            Step.CONFIRM: set(run.listed) - set(run.confirmations),
            Step.UNMASK: set(run.listed) - set(run.reveals),
            Step.AGREE: set(run.listed) - set(run.digests),
        }[run.step]
        missing = self._missing() if run.step >= Step.UNMASK else []
        if missing and run.step is Step.AGREE:
            # Nobody can check the sum before the uploads are back.
            waiting = set()
        asked = {hospital: self._task(hospital, run.step) for hospital in sorted(waiting)}
        for hospital in missing:
            asked[hospital] = self._task(hospital, Step.UPLOAD)
        return asked

    def _missing(self) -> list[str]:
        """Survivors whose ciphertext the aggregator lost."""
        return [h for h in self.run.listed if (self.run.attempt, h) not in self._ciphertexts]

    def _task(self, hospital: str, step: Step) -> Task:
        run = self.run
        agree = step is Step.AGREE
        return Task(
            step,
            run.attempt,
            self.roster.ids,
            self.epoch,
            self._oldest,
            adverts=run.sealed,
            sharers=run.sharers,
            shares=self.shares_for(hospital) if step is Step.UPLOAD else (),
            survivors=run.survivors,
            confirmations=dict(run.confirmations),
            opening=run.opening,
            uploads=tuple(run.uploads[h] for h in run.listed) if agree else (),
            ciphertexts={h: self._ciphertexts[run.attempt, h] for h in run.listed} if agree else {},
            total=run.total,
        )

    def shares_for(self, hospital: str) -> tuple[Signed, ...]:
        """What the sharers sealed for one hospital."""
        position = sorted(s.hospital_id for s in self.run.sealed)
        found = []
        for sender in self.run.sharers:
            if sender != hospital:
                recipients = [h for h in position if h != sender]
                found.append(self.run.shares[sender][recipients.index(hospital)])
        return tuple(found)

    def receive(self, answer: Answer) -> None:
        """Take an answer; an answer to another attempt or too late a step is of no interest."""
        if answer.attempt != self.run.attempt or self._registry.round != self.run.attempt.round:
            return
        try:
            self._accept(answer)
        except FedmeshError as error:
            self.blamed.append((answer.hospital_id, error))
        self._advance(late=False)

    def _accept(self, answer: Answer) -> None:
        run, who = self.run, answer.hospital_id
        if answer.step is Step.UPLOAD and run.step >= Step.UPLOAD and who in run.sharers:
            self._take_upload(answer)
        if answer.step is not run.step:
            return
        if run.step is Step.TRAIN:
            opening.check_advert(answer.signed[0], self.roster, run.attempt, self.epoch, self._oldest)
            run.adverts[who] = answer.signed[0]
        elif run.step is Step.SHARE:
            opening.check_shares(answer.signed, self.roster, run.attempt, run.sealed, who)
            run.shares[who] = answer.signed
        elif run.step is Step.CONFIRM and who in run.listed:
            opening.check_confirmation(run.survivors, self.roster, who, answer.signature)
            run.confirmations[who] = answer.signature
        elif run.step is Step.UNMASK and who in run.listed:
            flat = [share for shares in run.shares.values() for share in shares]
            opening.check_reveal(answer.signed[0], self.roster, run.survivors, flat)
            run.reveals[who] = answer.signed[0]
        elif run.step is Step.AGREE and who in run.listed:
            run.digests[who] = opening.check_digest(answer.signed[0], self.roster, run.survivors)

    def _take_upload(self, answer: Answer) -> None:
        run, who, signed = self.run, answer.hospital_id, answer.signed[0]
        adverts = statements.adverts_digest(run.sealed)
        upload = opening.check_upload(signed, self.roster, run.attempt, adverts, run.sharers)
        if sha256(answer.ciphertext) != upload.ciphertext_sha256:
            raise FedmeshError(Code.CIPHERTEXT_INVALID, "not the bytes of the statement")
        if run.step is Step.UPLOAD:
            run.uploads[who] = signed
        if run.uploads.get(who) == signed:
            self._ciphertexts[run.attempt, who] = answer.ciphertext

    def deadline(self) -> None:
        """The phase's time is over."""
        if self._registry.round == self.run.attempt.round:
            self._advance(late=True)

    def _advance(self, late: bool) -> None:
        step = self.run.step
        if step is Step.TRAIN:
            self._seal(late)
        elif step is Step.SHARE:
            self._close_sharing(late)
        elif step is Step.UPLOAD:
            self._close_uploads(late)
        elif step is Step.CONFIRM:
            self._store(late)
        elif step is Step.UNMASK:
            self._unmask(late)
        else:
            self._agree(late)

    def _ripe(self, have: int, all_of: int, late: bool, quorum: bool = False) -> bool:
        """Whether to go on: everybody answered, or t did and that is enough or the time is over. Aborts if never."""
        enough = have >= self.roster.threshold
        if have == all_of or (enough and (late or (quorum and not self._patient))):
            return True
        if late:
            self._abort()
        return False

    def _abort(self) -> None:
        self.aborted.append(self.run.attempt)
        self.run = self._begin()

    def _seal(self, late: bool) -> None:
        run = self.run
        enough = self._enough and len(run.adverts) >= max(self._enough, self.roster.threshold)
        if enough or self._ripe(len(run.adverts), self.roster.size, late):
            run.sealed = tuple(run.adverts[h] for h in sorted(run.adverts))
            run.step = Step.SHARE

    def _close_sharing(self, late: bool) -> None:
        run = self.run
        if self._ripe(len(run.shares), len(run.sealed), late):
            run.sharers = tuple(sorted(run.shares))
            run.step = Step.UPLOAD

    def _close_uploads(self, late: bool) -> None:
        run = self.run
        if self._ripe(len(run.uploads), len(run.sharers), late):
            run.survivors = opening.survivors_statement(
                self.roster, self.epoch, run.attempt, run.sealed, run.sharers, run.uploads
            )
            run.listed = tuple(sorted(run.uploads))
            run.step = Step.CONFIRM

    def _store(self, late: bool) -> None:
        run = self.run
        if not self._ripe(len(run.confirmations), len(run.listed), late, quorum=True):
            return
        stored = Stored(
            run.attempt,
            run.survivors,
            dict(run.confirmations),
            run.sealed,
            run.sharers,
            dict(run.shares),
            dict(run.uploads),
        )
        try:
            self._registry.store_survivors(stored)
        except FedmeshError:
            self._abort()
            return
        run.stored = stored
        run.step = Step.UNMASK

    def _unmask(self, late: bool) -> None:
        run = self.run
        ready = len(run.reveals) >= self.roster.threshold and not self._missing()
        if ready and (late or not self._patient or len(run.reveals) == len(run.listed)):
            found = opening.open_masks(self.roster, run.survivors, run.sealed, list(run.reveals.values()))
            keys = opening.mask_keys(run.sealed, self.roster, run.sharers)
            plan = opening.correction(run.attempt, keys, run.listed, found)
            run.opening = found
            run.total = self._arithmetic.total([self._ciphertexts[run.attempt, h] for h in run.listed], plan)
            run.step = Step.AGREE
        elif late:
            self._close(None)

    def _agree(self, late: bool) -> None:
        run = self.run
        votes = Counter((d.sum_sha256, d.digest, d.next_state_sha256) for d in run.digests.values())
        agreed = [vote for vote, count in votes.items() if count >= self.roster.threshold]
        if agreed and (late or not self._patient or len(run.digests) == len(run.listed)):
            self._close(run.total if agreed[0][0] == sha256(run.total) else None)
        elif late:
            self._close(None)

    def _close(self, total: Segments | None) -> None:
        assert self.run.stored is not None
        self._registry.close(self.run.stored, total)

    def next_round(self, roster: Roster) -> None:
        """Go on after the open round closed, under the roster that stands now."""
        self.roster = roster
        self.run = self._begin()
