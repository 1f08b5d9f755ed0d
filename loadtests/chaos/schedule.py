"""When calls are due, whatever becomes of the ones before: an open loop."""

import random
from collections.abc import Iterator, Mapping


def arrivals(per_second: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which calls are due: a Poisson process, the same for the same seed."""
    chance, at = random.Random(seed), 0.0  # noqa: S311 - a schedule
    while True:
        at += chance.expovariate(per_second)
        yield at


def mixture(weights: Mapping[str, float], seed: int) -> Iterator[str]:
    """Names in random order, each as often as its weight says."""
    chance = random.Random(seed)  # noqa: S311 - a schedule
    names, shares = list(weights), list(weights.values())
    while True:
        yield chance.choices(names, shares)[0]
