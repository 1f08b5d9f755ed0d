"""What a dishonest centre with f hospitals can try: whole attempts, retries and sums here, and the list of all."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from services.secure_sum import derive
from services.secure_sum.opening import Opening
from services.secure_sum.statements import Signed
from tests.simulation.arithmetic import RING, Segments
from tests.simulation.collusion import equivocation, groups
from tests.simulation.collusion.attack import EQUIVOCATION, INVALID, WRONG_SUM, Attack, Run
from tests.simulation.messages import Step


class Look(Attack):
    """The passive view of a whole attempt."""


class DropOne(Attack):
    """Take an upload, then say that its hospital dropped out, so that its mask seed is revealed."""

    lone = True

    def dropped(self, run: Run) -> set[str]:
        return {self.game.c}


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


STRATEGIES: tuple[type[Attack], ...] = (
    Look,
    DropOne,
    equivocation.SwapAdverts,
    equivocation.SwapAdvertsForeignSigned,
    equivocation.EquivocateGroups,
    equivocation.EquivocateSharers,
    equivocation.EquivocateSurvivors,
    equivocation.RevealTwice,
    equivocation.ForgeConfirmations,
    equivocation.ReplayAdverts,
    equivocation.ReplayLists,
    ForceRetry,
    RetryAfterUnmasking,
    CompareRounds,
    LieAboutSeeds,
    DealBadly,
    WrongSum,
    CountTwice,
    groups.SmallGroup,
    groups.FewSharers,
    groups.FewSurvivors,
    groups.CopyKeys,
    groups.WeakKeys,
    groups.Sybils,
    groups.RemovedMember,
)
