"""The noise of a masked upload says nothing about its values; with values and mask scaled apart it says enough."""

from collections.abc import Callable

import numpy as np
import pytest

from services.secure_sum import public, ring, secret, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout, layout_of
from tests.simulation.collusion import rounding
from tests.simulation.collusion.statistics import chance

KEY = secret.generate_group_key()
LAYOUT = layout_of(DEFAULT.name, 8192, 2)

Protect = Callable[[Layout, Int64Vector, Coefficients], bytes]


def together(layout: Layout, values: Int64Vector, mask: Coefficients) -> bytes:
    """As hospitals do it."""
    return public.add_masked(layout, 0, next(secret.encrypt_zeros(KEY, layout)), values, mask)


def apart(layout: Layout, values: Int64Vector, mask: Coefficients) -> bytes:
    """The mutant: a mask on a ciphertext of the values."""
    return public.add_mask(layout, 0, next(secret.encrypt_segments(values, KEY, layout)), mask)


def right_guesses(games: int, protect: Protect, bound: int, layout: Layout) -> int:
    rng = np.random.default_rng(games * bound)
    right = 0
    for _ in range(games):
        candidates = rng.integers(-bound, bound, (2, layout.vector_length))
        world = int(rng.integers(2))
        mask = rng.integers(0, DEFAULT.plain_modulus, layout.coefficients(0)[1], dtype=np.uint64)
        upload = protect(layout, candidates[world], mask)
        y, noise = rounding.read(layout, KEY, upload)
        first, second = (rounding.weigh(noise, y, candidate, layout) for candidate in candidates)
        right += int(second > first) == world
    return right


def test_the_noise_is_read_exactly() -> None:
    c0, seeds = wire.split_upload(LAYOUT, 0, next(secret.encrypt_zeros(KEY, LAYOUT)))
    pushed = [wire.join(ring.reduce(c0 + np.uint64(more), DEFAULT), seeds) for more in (0, 2)]
    found = [rounding.read(LAYOUT, KEY, upload)[1] for upload in pushed]
    assert np.array_equal(found[1], found[0] + 2)
    assert np.abs(found[0]).max() <= 21
    assert 3.0 < found[0].std() < 3.5


@pytest.mark.parametrize("bound", [1 << 10, 1 << 19])
def test_two_vectors_cannot_be_told_apart(bound: int) -> None:
    games = 30
    assert right_guesses(games, together, bound, LAYOUT) in chance(games)


@pytest.mark.parametrize("bound", [1 << 10, 1 << 19])
def test_a_mask_on_a_ciphertext_of_the_values_is_not_enough(bound: int) -> None:
    games = 24
    assert right_guesses(games, apart, bound, LAYOUT) == games


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 2])
def test_two_vectors_cannot_be_told_apart_in_many_games(lanes: int) -> None:
    games, layout = 400, layout_of(DEFAULT.name, 4096 * lanes, lanes)
    assert right_guesses(games, together, 1 << 20, layout) in chance(games)
