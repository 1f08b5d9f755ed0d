"""The coalition's way through an attempt. `Attack` itself only looks; every strategy bends some of its hooks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.common.errors import Code
from services.secure_sum import opening, statements
from services.secure_sum.opening import Opening
from services.secure_sum.statements import Advert, AttemptRef, Share, Signed, Survivors
from tests.simulation.arithmetic import Segments
from tests.simulation.collusion.game import Game, Opened
from tests.simulation.messages import Answer, Step, Task

EPOCH = 1
# How honest hospitals refuse.
INVALID = frozenset({Code.STATEMENT_INVALID})
TOO_FEW = frozenset({Code.PRIVACY_REFUSED})
EQUIVOCATION = frozenset({Code.EQUIVOCATION})
WRONG_SUM = frozenset({Code.CIPHERTEXT_INVALID})


@dataclass
class Run:
    """What the centre holds of one attempt."""

    attempt: AttemptRef
    adverts: dict[str, Signed] = field(default_factory=dict)
    shares: dict[str, tuple[Signed, ...]] = field(default_factory=dict)
    uploads: dict[str, Signed] = field(default_factory=dict)
    ciphertexts: dict[str, Segments] = field(default_factory=dict)
    confirmations: dict[bytes, dict[str, bytes]] = field(default_factory=dict)
    total: Segments = ()


class Attack:
    """Looks at everything and follows the protocol."""

    lone: ClassVar[bool] = False
    refused_with: ClassVar[frozenset[Code]] = frozenset()
    """Codes with which honest hospitals must answer the attack; empty: there is nothing to refuse."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.cohort = game.roster.ids

    def play(self) -> None:
        self.run(self.game.attempt(1, 1))

    def run(self, attempt: AttemptRef, last: Step = Step.AGREE) -> Run:
        """One attempt, as far as `last`; hospitals that refuse drop out of it."""
        run = Run(attempt)
        steps = (self.train, self.share, self.upload, self.confirm, self.unmask, self.agree)
        for step in steps[: last + 1]:
            step(run)
        return run

    # --- what hospitals are told: hooks

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        return run.adverts.values()

    def sharers_for(self, run: Run, hospital: str) -> tuple[str, ...]:
        return tuple(sorted(run.shares))

    def shares_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        for sender in self.sharers_for(run, hospital):
            if sender != hospital:
                yield from (s for s in run.shares[sender] if statements.parse(Share, s.statement).recipient == hospital)

    def dropped(self, run: Run) -> set[str]:
        """Uploaders whom the list of survivors leaves out."""
        return set()

    def survivors_for(self, run: Run, hospital: str) -> bytes:
        return self.survivors(run, self.dropped(run))

    def confirmations_for(self, run: Run, hospital: str) -> Mapping[str, bytes]:
        return run.confirmations.get(self.survivors_for(run, hospital), {})

    def opening_for(self, run: Run, hospital: str) -> Opening | None:
        return self.opening(run, self.listed(self.survivors_for(run, hospital)))

    def total_for(self, run: Run, hospital: str) -> Segments:
        """The sum that goes with the opening for this hospital."""
        listed = self.listed(self.survivors_for(run, hospital))
        found = self.opening_for(run, hospital)
        return self.total(run, listed, found) if found else ()

    def uploads_for(self, run: Run, hospital: str) -> tuple[Signed, ...]:
        return tuple(run.uploads[h] for h in self.listed(self.survivors_for(run, hospital)))

    def ciphertexts_for(self, run: Run, hospital: str) -> Mapping[str, Segments]:
        return run.ciphertexts

    # --- the steps

    def task(self, run: Run, step: Step, hospital: str) -> Task:
        task = Task(step, run.attempt, self.cohort, EPOCH)
        if step is Step.SHARE:
            return replace(task, adverts=tuple(self.adverts_for(run, hospital)))
        if step is Step.UPLOAD:
            return replace(task, sharers=self.sharers_for(run, hospital), shares=tuple(self.shares_for(run, hospital)))
        if step >= Step.CONFIRM:
            task = replace(task, survivors=self.survivors_for(run, hospital))
        if step >= Step.UNMASK:
            task = replace(task, confirmations=self.confirmations_for(run, hospital))
        if step is Step.AGREE:
            task = replace(
                task,
                opening=self.opening_for(run, hospital),
                uploads=self.uploads_for(run, hospital),
                ciphertexts=self.ciphertexts_for(run, hospital),
                total=self.total_for(run, hospital),
            )
        return task

    def ask(self, run: Run, step: Step, hospital: str) -> Answer | None:
        return self.game.ask(hospital, self.task(run, step, hospital))

    def train(self, run: Run) -> None:
        for hospital in self.cohort:
            answer = self.ask(run, Step.TRAIN, hospital)
            if answer is not None:
                run.adverts[hospital] = answer.signed[0]
                self.learn_advert(run.attempt, hospital, answer.signed[0])

    def learn_advert(self, attempt: AttemptRef, hospital: str, signed: Signed) -> None:
        knowledge = self.game.knowledge
        knowledge.adverts[attempt, hospital] = statements.parse(Advert, signed.statement)
        if hospital in self.game.corrupt:
            state = self.game.hospitals[hospital].state(attempt)
            knowledge.own_seed(attempt, hospital, "self", state.self_seed)
            knowledge.own_seed(attempt, hospital, "mask", state.mask_seed)
            knowledge.own_key(X25519PrivateKey.from_private_bytes(state.transport_key))

    def share(self, run: Run) -> None:
        for hospital in run.adverts:
            answer = self.ask(run, Step.SHARE, hospital)
            if answer is not None:
                run.shares[hospital] = answer.signed
                self.game.knowledge.sealed(answer.signed)
        for hospital in set(self.game.corrupt) & run.adverts.keys():
            state = self.game.hospitals[hospital].state(run.attempt)
            if state.own_share is not None:
                for kind, share in zip(("self", "mask"), state.own_share, strict=True):
                    self.game.knowledge.share(run.attempt, hospital, kind, hospital, share)  # type: ignore[arg-type]

    def upload(self, run: Run) -> None:
        for hospital in run.shares:
            answer = self.ask(run, Step.UPLOAD, hospital)
            if answer is not None:
                run.uploads[hospital], run.ciphertexts[hospital] = answer.signed[0], answer.ciphertext
                values = self.game.plain.open(answer.ciphertext)
                sharers = self.sharers_for(run, hospital)
                self.game.knowledge.uploaded(run.attempt, hospital, values, sharers)

    def confirm(self, run: Run) -> None:
        for hospital in sorted(run.uploads):
            answer = self.ask(run, Step.CONFIRM, hospital)
            if answer is not None:
                signed = self.survivors_for(run, hospital)
                run.confirmations.setdefault(signed, {})[hospital] = answer.signature

    def unmask(self, run: Run) -> None:
        for hospital in sorted(run.uploads):
            answer = self.ask(run, Step.UNMASK, hospital)
            if answer is not None:
                for signed in answer.signed:
                    self.game.knowledge.revealed(signed)
        for survivors in run.confirmations:
            self.note_opened(run, survivors)

    def note_opened(self, run: Run, survivors: bytes) -> None:
        listed = self.listed(survivors)
        found = self.opening(run, listed)
        if found is not None:
            run.total = self.total(run, listed, found)
            self.game.opened.append(Opened(run.attempt, listed, self.game.plain.open(run.total)))

    def agree(self, run: Run) -> None:
        for hospital in sorted(run.uploads):
            if self.opening_for(run, hospital) is not None:
                self.ask(run, Step.AGREE, hospital)

    # --- tools

    def survivors(self, run: Run, without: set[str]) -> bytes:
        """A list without some uploaders, however short it gets."""
        names = sorted(set(run.uploads) - without)
        listed = tuple(
            statements.Survivor(
                hospital_id=h,
                upload=run.uploads[h].sha256,
                complaints=statements.parse(statements.Upload, run.uploads[h].statement).complaints,
            )
            for h in names
        )
        said = Survivors.model_construct(
            type="survivors",
            roster=self.game.roster.sha256,
            epoch=EPOCH,
            attempt=run.attempt,
            adverts=statements.adverts_digest(run.adverts.values()),
            sharers=tuple(sorted(run.shares)),
            survivors=listed,
        )
        return said.encode()

    def listed(self, survivors: bytes) -> tuple[str, ...]:
        return Survivors.model_validate_json(survivors).ids

    def opening(self, run: Run, listed: Iterable[str]) -> Opening | None:
        """The seeds that remove the masks, when the coalition can compute them all."""
        survived = set(listed)
        known = {h: self.game.knowledge.seeds(run.attempt, h, "self") for h in survived}
        missing = set(run.shares) - survived
        known |= {h: self.game.knowledge.seeds(run.attempt, h, "mask") for h in missing}
        if not all(known.values()):
            return None
        return Opening({h: known[h][0] for h in sorted(survived)}, {h: known[h][0] for h in sorted(missing)})

    def total(self, run: Run, listed: Iterable[str], found: Opening) -> Segments:
        """The sum, computed as the aggregator does."""
        keys = opening.mask_keys(list(run.adverts.values()), self.game.roster, sorted(run.shares))
        survived = sorted(listed)
        plan = opening.correction(run.attempt, keys, survived, found)
        return self.game.plain.total([run.ciphertexts[h] for h in survived], plan)
