"""Play schedules again by their seeds: `python -m tests.simulation --seed N`."""

import argparse
import sys
import time
from collections.abc import Iterable

from services.secure_sum.parameters import DEFAULT, parameter_set_names
from tests.simulation.asynchronous import build_slow, play_slow
from tests.simulation.oracle import Violation
from tests.simulation.schedules import build, encrypted, play_all, total
from tests.simulation.world import Summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) seed")
    parser.add_argument("--count", type=int, default=1, help="seeds from there on; one is shown event by event")
    parser.add_argument("--asynchronous", action="store_true", help="asynchronous rounds with slow hospitals")
    parser.add_argument(
        "--encrypted", nargs="?", const=DEFAULT.name, choices=parameter_set_names(), help="with the real BFV layer"
    )
    arguments = parser.parse_args()
    arithmetic = encrypted(arguments.encrypted) if arguments.encrypted else None
    if arguments.count > 1:
        seeds = range(arguments.seed, arguments.seed + arguments.count)
        return run_many(seeds, map(play_slow, seeds) if arguments.asynchronous else play_all(seeds, arithmetic))
    world = build_slow(arguments.seed) if arguments.asynchronous else build(arguments.seed, arithmetic)
    try:
        world.run()
    except Violation as violation:
        world.log.append(f"VIOLATION: {violation}")
        return 1
    finally:
        print("\n".join(world.log))
        print(world.summary)
    return 0


def run_many(seeds: range, playing: Iterable[Summary]) -> int:
    began = time.monotonic()
    whole = total(playing)
    print(f"{len(seeds)} schedules in {time.monotonic() - began:.1f} s: {whole.attempts} attempts, ", end="")
    print(f"{whole.committed} rounds committed, {whole.burnt} burnt")
    print(", ".join(f"{what} {count}" for what, count in sorted(whole.happened.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
