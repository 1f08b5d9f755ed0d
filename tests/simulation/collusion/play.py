"""Whole games, and what many of them come to."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.simulation.collusion.attack import Attack
from tests.simulation.collusion.game import REAL, Build, Game, Verdict
from tests.simulation.collusion.guesses import GUESSES, judge
from tests.simulation.collusion.statistics import chance


def play(strategy: type[Attack], seed: int, size: int, build: Build = REAL) -> Verdict:
    """One game; everything but the keys follows from the arguments."""
    game = Game(seed, size, build, strategy.lone, strategy.__name__)
    with build.applied():
        strategy(game).play()
        return judge(game)


@dataclass
class Tally:
    """Games against the real protocol."""

    games: int = 0
    right: Counter[str] = field(default_factory=Counter)

    def add(self, strategy: type[Attack], seed: int, size: int) -> None:
        """Play one more; it must not be won outright, and what had to be refused was."""
        verdict = play(strategy, seed, size)
        where = f"{strategy.__name__}, seed {seed}, {size} hospitals"
        assert not verdict.recovered, f"a vector was recovered: {where}"
        assert not verdict.spoiled, f"a wrong sum was accepted: {where}"
        assert not verdict.twice, f"two sums of one round were unmasked: {where}"
        codes = {error.code for _, _, error in verdict.refused}
        assert not strategy.refused_with or codes & strategy.refused_with, f"nothing was refused: {where}"
        self.games += 1
        self.right.update(name for name, right in verdict.guesses.items() if right)

    def add_all(self, strategy: type[Attack], seeds: Iterable[int], size: int) -> None:
        for seed in seeds:
            self.add(strategy, seed, size)

    def require_luck(self) -> None:
        """No way of guessing does better or worse than coins."""
        for name in GUESSES:
            assert self.right[name] in chance(self.games), f"{name}: {self.right[name]} of {self.games}"
