"""From a seed to a schedule: the seed decides the size of the consortium, the weather and every event."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from services.secure_sum.cohort import threshold
from services.secure_sum.epoch import make_epoch, maker_order, open_epoch
from services.secure_sum.parameters import DEFAULT
from tests.simulation.arithmetic import Arithmetic, Encrypted
from tests.simulation.consortium import consortium
from tests.simulation.oracle import Violation
from tests.simulation.world import Summary, Weather, World

SIZES = (4, 4, 4, 4, 5, 5, 6, 7)


def fair(rng: random.Random, size: int) -> Weather:
    """At most n - t drops; hospitals crash and come back; messages are reordered and doubled, none is lost otherwise.

    No deadline comes while anything can still happen.
    """
    tolerated = size - threshold(size)
    return Weather(
        events=rng.randint(40, 40 * size),
        duplicate=0.1,
        replay=0.03,
        crash=rng.choice((0.0, 0.03)),
        dropped=rng.randint(0, tolerated),
    )


def stormy(rng: random.Random, size: int) -> Weather:
    """Anything; sometimes more drops than the protocol tolerates."""
    bad = rng.random() < 0.15
    rounds = rng.choice((1, 1, 2))
    changes = (None, "join", "leave") if size > 4 else (None, "join")
    return Weather(
        events=rng.randint(30, 60 * size),
        lose=rng.choice((0.0, 0.05, 0.2)),
        duplicate=rng.choice((0.0, 0.1, 0.3)),
        replay=rng.choice((0.0, 0.05, 0.2)),
        crash=rng.choice((0.0, 0.02, 0.1)),
        deadline=rng.choice((0.0, 0.01, 0.04)),
        coordinator=rng.choice((0.0, 0.01, 0.03)),
        zombie=rng.choice((0.0, 0.5)),
        aggregator=rng.choice((0.0, 0.3)),
        dropped=rng.randint(0, size) if bad else rng.randint(0, size - threshold(size)),
        rounds=rounds,
        change=rng.choice(changes) if rounds > 1 else None,
    )


def build(seed: int, arithmetic: Arithmetic | None = None) -> World:
    """The world of a seed. Every fourth seed is fair, the others are stormy."""
    rng = random.Random(f"fedmesh {seed}")
    size = rng.choice(SIZES)
    weather = fair(rng, size) if seed % 4 == 0 else stormy(rng, size)
    return World(seed, size, weather, arithmetic)


def play(seed: int, arithmetic: Arithmetic | None = None) -> Summary:
    """Run one schedule.

    Raises:
        Violation: with the seed and the command that plays it again.
    """
    world = build(seed, arithmetic)
    fair_until_the_end = seed % 4 == 0
    try:
        summary = world.run()
        if fair_until_the_end and (summary.committed, summary.attempts) != (1, 1):
            raise Violation("with at most n - t drops and fair delivery the first attempt completes")
    except Exception as error:
        how = f" --encrypted {arithmetic.parameter_set}" if isinstance(arithmetic, Encrypted) else ""
        raise Violation(f"seed {seed}: {error}\nreplay: python -m tests.simulation --seed {seed}{how}") from error
    return summary


@lru_cache
def encrypted(parameter_set: str = DEFAULT.name) -> Encrypted:
    """Small vectors under keys that one member made and the others opened."""
    members = consortium(min(SIZES))
    first, second, *_ = maker_order(members.roster, 1)
    _, statement = make_epoch(members.keys[first], members.roster, 1, public=True)
    keys = open_epoch(statement, members.keys[second], members.roster)
    return Encrypted(keys, length=12, lanes=2, parameter_set=parameter_set)


def play_all(seeds: Iterable[int], arithmetic: Arithmetic | None = None) -> Iterator[Summary]:
    for seed in seeds:
        yield play(seed, arithmetic)


def total(summaries: Iterable[Summary]) -> Summary:
    """All of them in one."""
    whole = Summary(seed=-1)
    for one in summaries:
        whole = replace(
            whole,
            happened=whole.happened + one.happened,
            committed=whole.committed + one.committed,
            burnt=whole.burnt + one.burnt,
            attempts=whole.attempts + one.attempts,
        )
    return whole
