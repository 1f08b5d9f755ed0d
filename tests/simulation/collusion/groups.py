"""Strategies about who takes part: too few, copies, strangers, one class a strategy."""

from collections.abc import Iterable
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.secure_sum import roster, statements
from services.secure_sum.roster import MemberKeys
from services.secure_sum.statements import Advert, AttemptRef, Signed
from tests.simulation.collusion.attack import EPOCH, INVALID, TOO_FEW, Attack, Run
from tests.simulation.collusion.equivocation import EquivocateSurvivors
from tests.simulation.messages import Step


class SmallGroup(Attack):
    """A group of t - 1: the coalition and a few honest hospitals."""

    refused_with = TOO_FEW

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        chosen = (*self.game.corrupt, self.game.a, self.game.b, *self.game.honest)
        few = list(dict.fromkeys(chosen))[: self.game.roster.threshold - 1]
        return [run.adverts[h] for h in few if h in run.adverts] if hospital in few else run.adverts.values()


class FewSharers(SmallGroup):
    """A whole group, of which only t - 1 are said to have shared."""

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        return Attack.adverts_for(self, run, hospital)

    def sharers_for(self, run: Run, hospital: str) -> tuple[str, ...]:
        chosen = (*self.game.corrupt, self.game.a, self.game.b, *self.game.honest)
        few = list(dict.fromkeys(chosen))[: self.game.roster.threshold - 1]
        return tuple(sorted(few)) if hospital in few else super().sharers_for(run, hospital)


class FewSurvivors(EquivocateSurvivors):
    """A list of t - 1 survivors, `a` and `b` among them."""

    refused_with = TOO_FEW

    def without(self, hospital: str) -> set[str]:
        chosen = (*self.game.corrupt, self.game.a, self.game.b, *self.game.honest)
        few = list(dict.fromkeys(chosen))[: self.game.roster.threshold - 1]
        return set(self.game.roster.ids) - set(few)


class CopyKeys(Attack):
    """A hospital of the coalition advertises the keys of an honest one."""

    refused_with = INVALID

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        thief = self.game.corrupt[0]
        stolen = statements.parse(Advert, run.adverts[self.game.a].statement)
        copy = stolen.model_copy(update={"hospital_id": thief})
        changed = {**run.adverts, thief: statements.sign(copy, self.game.members.keys[thief])}
        return changed.values()


class WeakKeys(Attack):
    """A hospital of the coalition advertises a mask key of low order, with which every exchange gives zero."""

    refused_with = INVALID

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        thief = self.game.corrupt[0]
        own = statements.parse(Advert, run.adverts[thief].statement).model_copy(update={"mask_key": "00" * 32})
        return {**run.adverts, thief: statements.sign(own, self.game.members.keys[thief])}.values()


class Sybils(Attack):
    """A new roster full of hospitals of the coalition's making, signed by the coalition alone."""

    def play(self) -> None:
        game, before = self.game, self.game.roster
        sybils = [MemberKeys.generate(f"sybil{i:02}") for i in range(3 * before.size)]
        keys = {**game.members.keys, **{key.hospital_id: key for key in sybils}}
        statement = roster.succeed(before, [key.public() for key in keys.values()])
        signatures = {h: roster.sign_roster(statement, keys[h]) for h in game.corrupt}
        try:
            after = roster.verify_successor(before, statement, signatures)
        except FedmeshError as error:
            game.refusals.append(("everybody", Step.TRAIN, error))
            return
        game.roster = game.knowledge.roster = after
        for key in sybils:
            game.add_sybil(key)
        for hospital in game.hospitals.values():
            hospital.adopt(after)
        self.cohort = tuple(sorted({game.a, *game.corrupt, *(key.hospital_id for key in sybils)}))
        self.run(game.attempt(1, 1), Step.UNMASK)

    refused_with: ClassVar[frozenset[Code]] = INVALID | TOO_FEW


class RemovedMember(Attack):
    """After a hospital was removed, the group still has its advert, under its old keys."""

    refused_with = INVALID

    def play(self) -> None:
        game, before = self.game, self.game.roster
        if before.size == 4:
            return self.foreign(game.attempt(1, 1))
        leaver = game.corrupt[0]
        keys = {h: key for h, key in game.members.keys.items() if h != leaver}
        statement = roster.succeed(before, [key.public() for key in keys.values()])
        signatures = {h: roster.sign_roster(statement, key) for h, key in keys.items()}
        after = roster.verify_successor(before, statement, signatures)
        for hospital in keys:
            game.hospitals[hospital].adopt(after)
        game.roster = after
        self.cohort = after.ids
        return self.foreign(game.attempt(1, 1))

    def foreign(self, attempt: AttemptRef) -> None:
        """An attempt with the adverts of somebody who is in no roster (any more)."""
        self._stranger = MemberKeys.generate("stranger")
        if self.game.roster.size != self.game.size:
            self._stranger = self.game.members.keys[self.game.corrupt[0]]
        self.run(attempt)

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        advert = Advert(
            roster=self.game.roster.sha256,
            epoch=EPOCH,
            attempt=run.attempt,
            hospital_id=self._stranger.hospital_id,
            mask_key=X25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
            transport_key=X25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
            seed_commitment="ab" * 32,
        )
        others = [signed for h, signed in run.adverts.items() if h != self.game.c]
        return [*others, statements.sign(advert, self._stranger)]
