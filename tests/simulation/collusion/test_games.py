"""The centre with 1 to 4 hospitals against the protocol, and against protocols that lack one thing."""

import pytest

from tests.simulation.collusion import equivocation, strategies
from tests.simulation.collusion.attack import Attack
from tests.simulation.collusion.game import REAL
from tests.simulation.collusion.mutants import MUTANTS, SPARE, Mutant
from tests.simulation.collusion.play import Tally, play
from tests.simulation.collusion.statistics import chance
from tests.simulation.collusion.strategies import STRATEGIES

DEEP = (strategies.Look, strategies.DropOne, equivocation.EquivocateSurvivors, equivocation.RevealTwice)
"""Played with 3 and 4 colluding hospitals in the default suite too."""


def name(of: type[Attack] | Mutant) -> str:
    return f"{of.build.name}, {of.broken_by.__name__}" if isinstance(of, Mutant) else of.__name__


def test_no_strategy_learns_or_spoils_anything() -> None:
    tally = Tally()
    for strategy in STRATEGIES:
        tally.add_all(strategy, range(7), 4)
    tally.require_luck()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=name)
def test_two_hospitals_with_the_centre_fail(strategy: type[Attack]) -> None:
    Tally().add_all(strategy, range(100, 101), 7)


@pytest.mark.parametrize("strategy", DEEP, ids=name)
@pytest.mark.parametrize("size", [10, 13])
def test_three_and_four_hospitals_with_the_centre_fail(strategy: type[Attack], size: int) -> None:
    Tally().add_all(strategy, range(200, 201), size)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=name)
def test_no_strategy_learns_or_spoils_anything_in_many_games(strategy: type[Attack]) -> None:
    tally = Tally()
    for size, games in ((4, 150), (7, 40), (10, 12), (13, 6)):
        tally.add_all(strategy, range(1000, 1000 + games), size)
    tally.require_luck()


@pytest.mark.parametrize("mutant", MUTANTS, ids=name)
@pytest.mark.parametrize(("size", "games"), [(4, 3), (7, 1)])
def test_a_mutant_is_broken_in_every_game(mutant: Mutant, size: int, games: int) -> None:
    for seed in range(games):
        assert play(mutant.broken_by, seed, size, mutant.build).won


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.opens_targets], ids=name)
def test_the_worlds_of_a_mutant_can_be_told_apart(mutant: Mutant) -> None:
    games = 24
    right = sum(play(mutant.broken_by, seed, 4, mutant.build).guesses["subset sums"] for seed in range(games))
    assert right == games
    assert right not in chance(games)


@pytest.mark.parametrize("mutant", SPARE, ids=name)
def test_the_other_lock_holds(mutant: Mutant) -> None:
    for seed in range(3):
        assert not play(mutant.broken_by, seed, 4, mutant.build).won
    assert not play(mutant.broken_by, 0, 7, mutant.build).won


def test_every_strategy_that_must_be_refused_says_how() -> None:
    curious = {s for s in STRATEGIES if not s.refused_with}
    assert curious == {
        strategies.Look,
        strategies.DropOne,
        equivocation.EquivocateSurvivors,
        strategies.ForceRetry,
        strategies.CompareRounds,
    }
    assert REAL.patches == ()
