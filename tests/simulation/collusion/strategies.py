"""What a dishonest centre with f hospitals can try, one class a strategy."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, roster, shares, statements
from services.secure_sum.opening import Opening
from services.secure_sum.roster import MemberKeys
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import Advert, AttemptRef, Share, Signed
from tests.simulation.arithmetic import RING, Segments
from tests.simulation.collusion.attack import EPOCH, Attack, Run
from tests.simulation.collusion.game import Game
from tests.simulation.messages import Step

INVALID = frozenset({Code.STATEMENT_INVALID})
TOO_FEW = frozenset({Code.PRIVACY_REFUSED})
EQUIVOCATION = frozenset({Code.EQUIVOCATION})
WRONG_SUM = frozenset({Code.CIPHERTEXT_INVALID})


class Look(Attack):
    """The passive view of a whole attempt."""


class DropOne(Attack):
    """Take an upload, then say that its hospital dropped out, so that its mask seed is revealed."""

    lone = True

    def dropped(self, run: Run) -> set[str]:
        return {self.game.c}


class SwapAdverts(Attack):
    """Show every honest hospital the keys of the coalition in place of the other hospitals'; forge what follows."""

    refused_with = INVALID

    def __init__(self, game: Game) -> None:
        super().__init__(game)
        self._fakes: dict[tuple[str, str], tuple[bytes, X25519PrivateKey, bytes]] = {}

    def signature(self, hospital: str, statement: bytes) -> bytes:
        """Nobody's."""
        return bytes(64)

    def fake(self, run: Run, victim: str, hospital: str) -> Signed:
        """An advert under another hospital's name."""
        seed, transport, self_seed = self._fakes.setdefault(
            (victim, hospital), (os.urandom(16), X25519PrivateKey.generate(), os.urandom(16))
        )
        mask = derive.mask_key_pair(seed)
        self.game.knowledge.own_key(mask)
        self.game.knowledge.own_key(transport)
        advert = Advert(
            roster=self.game.roster.sha256,
            epoch=EPOCH,
            attempt=run.attempt,
            hospital_id=hospital,
            mask_key=mask.public_key().public_bytes_raw().hex(),
            transport_key=transport.public_key().public_bytes_raw().hex(),
            seed_commitment=derive.seed_commitment(run.attempt, hospital, self_seed),
        )
        self.game.knowledge.told.setdefault((run.attempt, victim), {})[hospital] = advert
        return Signed(hospital, advert.encode(), self.signature(hospital, advert.encode()))

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        if hospital in self.game.corrupt:
            return run.adverts.values()
        return [
            run.adverts[h] if h == hospital or h in self.game.corrupt else self.fake(run, hospital, h)
            for h in sorted(run.adverts)
        ]

    def shares_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        if hospital in self.game.corrupt:
            return super().shares_for(run, hospital)
        adverts = list(self.adverts_for(run, hospital))
        digest = statements.adverts_digest(adverts)
        own = statements.parse(Advert, run.adverts[hospital].statement)
        return [self.forge(run, h, own, digest) for h in self.sharers_for(run, hospital) if h != hospital]

    def forge(self, run: Run, sender: str, to: Advert, digest: str) -> Signed:
        """A share that the sender never dealt."""
        victim, pair = to.hospital_id, SharePair(os.urandom(16), os.urandom(16))
        if sender in self.game.corrupt:
            transport = X25519PrivateKey.from_private_bytes(
                self.game.hospitals[sender].state(run.attempt).transport_key
            )
        else:
            transport = self._fakes[victim, sender][1]
        context = derive.box_context(run.attempt, digest, sender, victim)
        share = Share(
            attempt=run.attempt,
            adverts=digest,
            sender=sender,
            recipient=victim,
            box=shares.seal(pair, transport, bytes.fromhex(to.transport_key), context).hex(),
            self_commitment=derive.share_commitment(run.attempt, sender, victim, "self", pair.self_share),
            mask_commitment=derive.share_commitment(run.attempt, sender, victim, "mask", pair.mask_share),
        )
        if sender in self.game.corrupt:
            return statements.sign(share, self.game.members.keys[sender])
        return Signed(sender, share.encode(), self.signature(sender, share.encode()))


class SwapAdvertsForeignSigned(SwapAdverts):
    """The same, signed by a hospital of the coalition."""

    def signature(self, hospital: str, statement: bytes) -> bytes:
        return statements.sign_bytes(statement, self.game.members.keys[self.game.corrupt[0]])


class EquivocateGroups(Attack):
    """A group without `c` for some, the whole group for the others."""

    refused_with = INVALID

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        smaller = hospital in (self.game.a, self.game.b)
        return [signed for h, signed in run.adverts.items() if not (smaller and h == self.game.c)]


class EquivocateSharers(Attack):
    """Tell one hospital that `c` did not share: their masks do not cancel, and all would agree on a wrong sum."""

    refused_with = INVALID

    def sharers_for(self, run: Run, hospital: str) -> tuple[str, ...]:
        return tuple(h for h in super().sharers_for(run, hospital) if (hospital, h) != (self.game.a, self.game.c))


class EquivocateSurvivors(Attack):
    """One half is shown a list with `c`, the other half one without it; the coalition signs both."""

    def without(self, hospital: str) -> set[str]:
        rest = [h for h in self.game.honest if h != self.game.c]
        return {self.game.c} if hospital in rest[: (len(rest) + 1) // 2] else set()

    def survivors_for(self, run: Run, hospital: str) -> bytes:
        return self.survivors(run, self.without(hospital))

    def confirm(self, run: Run) -> None:
        super().confirm(run)
        for without in (set[str](), {self.game.c}):
            self.sign_as_coalition(run, self.survivors(run, without))

    def sign_as_coalition(self, run: Run, survivors: bytes) -> None:
        for hospital in self.game.corrupt:
            signature = statements.sign_bytes(survivors, self.game.members.keys[hospital])
            run.confirmations.setdefault(survivors, {})[hospital] = signature

    def unmask(self, run: Run) -> None:
        super().unmask(run)
        self.give_away(run)

    def give_away(self, run: Run) -> None:
        """The coalition's own shares of everything."""
        for hospital in self.game.corrupt:
            for of, pair in self.game.hospitals[hospital].state(run.attempt).shares_in.items():
                self.game.knowledge.share(run.attempt, of, "self", hospital, pair.self_share)
                self.game.knowledge.share(run.attempt, of, "mask", hospital, pair.mask_share)


class RevealTwice(EquivocateSurvivors):
    """First the list with `c`, then, of the same hospitals, the one without it, with whatever signatures there are."""

    refused_with = EQUIVOCATION

    def __init__(self, game: Game) -> None:
        super().__init__(game)
        self._second = False

    def without(self, hospital: str) -> set[str]:
        return {self.game.c} if self._second else set()

    def unmask(self, run: Run) -> None:
        super().unmask(run)
        first = dict(run.confirmations)
        self._second = True
        super().confirm(run)
        self._lend(run, first)
        super().unmask(run)
        self._second = False

    def _lend(self, run: Run, first: Mapping[bytes, Mapping[str, bytes]]) -> None:
        """Signatures over the first list, as if they were over the second."""
        for signatures in first.values():
            for hospital, signature in signatures.items():
                run.confirmations.setdefault(self.survivors(run, {self.game.c}), {}).setdefault(hospital, signature)

    def note_opened(self, run: Run, survivors: bytes) -> None:
        """Only the first list is in the game: `c` is in no other sum."""
        if self.listed(survivors) == tuple(sorted(run.uploads)):
            super().note_opened(run, survivors)


class ForgeConfirmations(EquivocateSurvivors):
    """A list without `c` that only the coalition signed, and forged signatures of the others."""

    lone = True
    refused_with = INVALID

    def without(self, hospital: str) -> set[str]:
        return {self.game.c}

    def confirm(self, run: Run) -> None:
        survivors = self.survivors(run, {self.game.c})
        self.sign_as_coalition(run, survivors)
        forger = self.game.members.keys[self.game.corrupt[0]]
        for hospital in self.listed(survivors):
            run.confirmations[survivors].setdefault(hospital, statements.sign_bytes(survivors, forger))


class ReplayAdverts(Attack):
    """A second attempt with the adverts and shares of the first."""

    refused_with = INVALID

    def play(self) -> None:
        self._first = self.run(self.game.attempt(1, 1), Step.UPLOAD)
        self.run(self.game.attempt(1, 2))

    def adverts_for(self, run: Run, hospital: str) -> Iterable[Signed]:
        first = self._first.adverts if run.attempt.attempt == 2 else run.adverts
        return [run.adverts[h] if h == hospital else first[h] for h in run.adverts]


class ReplayLists(EquivocateSurvivors):
    """A second attempt in which the list, the signatures and the uploads of the first are shown again."""

    refused_with = INVALID

    def play(self) -> None:
        self._first = self.run(self.game.attempt(1, 1), Step.CONFIRM)
        self.run(self.game.attempt(1, 2))

    def without(self, hospital: str) -> set[str]:
        return set()

    def survivors_for(self, run: Run, hospital: str) -> bytes:
        if run.attempt.attempt == 2:
            return self.survivors(self._first, set())
        return super().survivors_for(run, hospital)

    def confirmations_for(self, run: Run, hospital: str) -> Mapping[str, bytes]:
        return self._first.confirmations[self.survivors(self._first, set())]


class ForceRetry(Attack):
    """Give an attempt up after the uploads, run another one, and compare."""

    def play(self) -> None:
        self.run(self.game.attempt(1, 1), Step.UPLOAD)
        self.run(self.game.attempt(1, 2))


class RetryAfterUnmasking(Attack):
    """Open an attempt, then claim that it failed and open another one at the same round, without `c`."""

    refused_with = EQUIVOCATION

    def play(self) -> None:
        self.run(self.game.attempt(1, 1), Step.UNMASK)
        self.run(self.game.attempt(1, 2), Step.UNMASK)

    def dropped(self, run: Run) -> set[str]:
        return {self.game.c} if run.attempt.attempt == 2 else set()


class CompareRounds(Attack):
    """`c` is in one round's sum, not in the next one's: its upload there is opened if masks repeat, and the sums'
    difference is its vector if noise repeats."""

    def play(self) -> None:
        self.run(self.game.attempt(1, 1))
        self.run(self.game.attempt(2, 1))

    def dropped(self, run: Run) -> set[str]:
        return {self.game.c} if run.attempt.round == 2 else set()


class LieAboutSeeds(Attack):
    """Open the masks with another seed for an honest survivor, and compute the sum to match."""

    refused_with = INVALID

    def opening_for(self, run: Run, hospital: str) -> Opening | None:
        found = super().opening_for(run, hospital)
        if found is None:
            return None
        return replace(found, self_seeds={**found.self_seeds, self.game.a: b"another seed 16b"})

    def total(self, run: Run, listed: Iterable[str], found: Opening) -> Segments:
        """The sum that these seeds give, right or wrong."""
        values = self.game.plain.open(super().total(run, listed, self._true(run, listed)))
        right, used = self._true(run, listed).self_seeds, found.self_seeds
        plan = []
        for h in used:
            if used[h] != right[h]:
                plan.append((derive.self_key(right[h], run.attempt, h), 1))
                plan.append((derive.self_key(used[h], run.attempt, h), -1))
        words = [(v + m) % RING for v, m in zip(values, self.game.plain.expand(tuple(plan)), strict=True)]
        return (b"".join(word.to_bytes(8, "little") for word in words),)

    def _true(self, run: Run, listed: Iterable[str]) -> Opening:
        found = self.opening(run, listed)
        assert found is not None
        return found


class DealBadly(LieAboutSeeds):
    """A hospital of the coalition shared a seed that is not the one it advertised; the centre uses what comes out."""

    def opening_for(self, run: Run, hospital: str) -> Opening | None:
        found = Attack.opening_for(self, run, hospital)
        if found is None:
            return None
        return replace(found, self_seeds={**found.self_seeds, self.game.corrupt[0]: b"not what it said"})


class WrongSum(Attack):
    """The aggregator adds something to one coefficient."""

    refused_with = WRONG_SUM

    def total_for(self, run: Run, hospital: str) -> Segments:
        total = super().total_for(run, hospital)
        words = list(self.game.plain.open(total))
        words[-1] += 1
        return (b"".join((word % RING).to_bytes(8, "little") for word in words),)


class CountTwice(Attack):
    """The list names an honest upload under a coalition hospital's name too."""

    refused_with = INVALID

    def survivors(self, run: Run, without: set[str]) -> bytes:
        thief, victim = self.game.corrupt[0], self.game.a
        uploads, run.uploads = run.uploads, {**run.uploads, thief: run.uploads[victim]}
        survivors = super().survivors(run, without)
        run.uploads = uploads
        return survivors

    def uploads_for(self, run: Run, hospital: str) -> tuple[Signed, ...]:
        thief, victim = self.game.corrupt[0], self.game.a
        return tuple(run.uploads[victim if h == thief else h] for h in sorted(run.uploads))

    def ciphertexts_for(self, run: Run, hospital: str) -> Mapping[str, Segments]:
        return {**run.ciphertexts, self.game.corrupt[0]: run.ciphertexts[self.game.a]}

    def total_for(self, run: Run, hospital: str) -> Segments:
        real, run.ciphertexts = run.ciphertexts, dict(self.ciphertexts_for(run, hospital))
        total = super().total_for(run, hospital)
        run.ciphertexts = real
        return total


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


STRATEGIES: tuple[type[Attack], ...] = (
    Look,
    DropOne,
    SwapAdverts,
    SwapAdvertsForeignSigned,
    EquivocateGroups,
    EquivocateSharers,
    EquivocateSurvivors,
    RevealTwice,
    ForgeConfirmations,
    ReplayAdverts,
    ReplayLists,
    ForceRetry,
    RetryAfterUnmasking,
    CompareRounds,
    LieAboutSeeds,
    DealBadly,
    WrongSum,
    CountTwice,
    SmallGroup,
    FewSharers,
    FewSurvivors,
    CopyKeys,
    WeakKeys,
    Sybils,
    RemovedMember,
)
