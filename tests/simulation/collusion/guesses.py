"""From what the coalition knows to an answer: which world is this, what did one hospital hold?"""

from collections.abc import Callable, Iterator
from itertools import combinations

from services.secure_sum.statements import AttemptRef
from tests.simulation.arithmetic import RING, Integers, add, centred
from tests.simulation.collusion.game import Game, Opened, Verdict
from tests.simulation.collusion.knowledge import Residue, subsets

MOST = 6
"""Subsets of more honest hospitals are not tried one by one."""

Residues = dict[AttemptRef, dict[str, Residue]]


def judge(game: Game) -> Verdict:
    residues: Residues = {}
    for attempt, hospital in game.knowledge.uploads:
        if hospital in game.honest:
            residues.setdefault(attempt, {})[hospital] = game.knowledge.residue(attempt, hospital)
    guesses = {name: guess(game, residues) for name, guess in GUESSES.items()}
    coin = game.random.randrange(2)
    right = {name: (coin if bit is None else bit) == game.bit for name, bit in guesses.items()}
    recovered = any(game.is_vector_of(*claim) for claim in claims(game, residues))
    return Verdict(right, recovered, bool(game.wrong_acceptances()), game.unmasked_twice(), tuple(game.refusals))


def claims(game: Game, residues: Residues) -> Iterator[tuple[AttemptRef, str, Integers]]:
    """Vectors that the coalition believes to be an honest hospital's."""
    for attempt, by_hospital in residues.items():
        for hospital, residue in by_hospital.items():
            yield attempt, hospital, residue.values
            for other, others in residues.items():
                if other != attempt and hospital in others:
                    yield attempt, hospital, subtract(residue.values, others[hospital].values)
    for one, two in combinations(game.opened, 2):
        for more, less in ((one, two), (two, one)):
            extra = set(more.survivors) - set(less.survivors)
            if set(less.survivors) <= set(more.survivors) and len(extra) == 1:
                yield more.attempt, extra.pop(), subtract(honest_part(game, more), honest_part(game, less))


def honest_part(game: Game, opened: Opened) -> Integers:
    """A sum without what the coalition put in itself."""
    own = [game.world(0, opened.attempt, h) for h in opened.survivors if h in game.corrupt]
    return subtract(opened.total, add(own)) if own else opened.total


def subtract(left: Integers, right: Integers) -> Integers:
    return tuple((x - y) % RING for x, y in zip(left, right, strict=True))


def _decide(fits: Callable[[int], bool]) -> int | None:
    found = [bit for bit in (0, 1) if fits(bit)]
    return found[0] if len(found) == 1 else None


def _same(left: Integers, right: Integers) -> bool:
    return all((x - y) % RING == 0 for x, y in zip(left, right, strict=True))


def by_subset_sums(game: Game, residues: Residues) -> int | None:
    """Masks of honest hospitals that cancel among some of them leave a sum that fits one world only."""
    for attempt, by_hospital in residues.items():
        for names in subsets(sorted(by_hospital), MOST if len(by_hospital) <= MOST else 2):
            left = add([by_hospital[h].values for h in names])
            bit = _decide(lambda w, a=attempt, n=names, s=left: _same(s, add([game.world(w, a, h) for h in n])))  # type: ignore[misc]
            if bit is not None:
                return bit
    return None


def by_differences(game: Game, residues: Residues) -> int | None:
    """Masks that are the same in two attempts."""
    for one, two in combinations(residues, 2):
        for hospital in residues[one].keys() & residues[two].keys():
            left = subtract(residues[one][hospital].values, residues[two][hospital].values)

            def fits(
                bit: int, h: str = hospital, found: Integers = left, i: AttemptRef = one, j: AttemptRef = two
            ) -> bool:
                return _same(found, subtract(game.world(bit, i, h), game.world(bit, j, h)))

            bit = _decide(fits)
            if bit is not None:
                return bit
    return None


def by_sums(game: Game, residues: Residues) -> int | None:
    """Sums that were opened, and differences between them."""
    for opened in game.opened:
        bit = _decide(
            lambda w, o=opened: _same(o.total, add([game.world(w, o.attempt, h) for h in o.survivors]))  # type: ignore[misc]
        )
        if bit is not None:
            return bit
    return None


def by_distance(game: Game, residues: Residues) -> int | None:
    """The world in which what is left of the masks is smaller."""
    scores = [0, 0]
    for attempt, by_hospital in residues.items():
        for hospital, residue in by_hospital.items():
            for bit in (0, 1):
                left = subtract(residue.values, game.world(bit, attempt, hospital))
                scores[bit] += sum(abs(centred(word)) for word in left)
    return None if scores[0] == scores[1] else int(scores[1] < scores[0])


def by_low_bits(game: Game, residues: Residues) -> int | None:
    """The world whose lowest bits agree more often."""
    scores = [0, 0]
    for attempt, by_hospital in residues.items():
        for hospital, residue in by_hospital.items():
            for bit in (0, 1):
                known = game.world(bit, attempt, hospital)
                scores[bit] += sum((x - y) % 2 == 0 for x, y in zip(residue.values, known, strict=True))
    return None if scores[0] == scores[1] else int(scores[1] > scores[0])


GUESSES: dict[str, Callable[[Game, Residues], int | None]] = {
    "subset sums": by_subset_sums,
    "differences": by_differences,
    "sums": by_sums,
    "distance": by_distance,
    "low bits": by_low_bits,
}
