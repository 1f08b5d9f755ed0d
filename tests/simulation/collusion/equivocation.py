"""Strategies that tell hospitals different things, or what was true of another attempt, one class a strategy."""

import os
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.secure_sum import derive, shares, statements
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import Advert, Share, Signed
from tests.simulation.collusion.attack import EPOCH, EQUIVOCATION, INVALID, Attack, Run
from tests.simulation.collusion.game import Game
from tests.simulation.messages import Step


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
