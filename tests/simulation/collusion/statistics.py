"""How many right guesses are still nothing but luck."""

from math import comb


def chance(games: int, doubt: float = 1e-6) -> range:
    """Right guesses of fair coins, outside of which `games` tosses end with probability below `doubt` (both tails).

    The range is about games/2 +- 2.5 sqrt(games). A coalition that is right with probability 1/2 + d leaves it almost
    surely when d > 4 / sqrt(games): 24 games see certainty, 1,000 an advantage of 0.13, 10,000 one of 0.04.
    """
    tail = 0.0
    for least in range(games // 2 + 1):
        tail += comb(games, least) / 2**games
        if 2 * tail > doubt:
            return range(least, games - least + 1)
    return range(games // 2, games // 2 + 1)
