import itertools
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.secure_sum import shares
from services.secure_sum.shares import SharePair


def test_every_t_shares_give_the_seed() -> None:
    seed = os.urandom(16)
    dealt = shares.split(seed, 4, 6)
    assert sorted(dealt) == [1, 2, 3, 4, 5, 6]
    for chosen in itertools.combinations(dealt, 4):
        assert shares.combine({x: dealt[x] for x in chosen}, 4) == seed
    assert shares.combine(dealt, 4) == seed


def test_fewer_than_t_shares_say_nothing() -> None:
    dealt = shares.split(bytes(16), 4, 6)
    with pytest.raises(FedmeshError) as caught:
        shares.combine({x: dealt[x] for x in (1, 2, 3)}, 4)
    assert caught.value.code is Code.INVALID_ARGUMENT
    # Taken for shares of a lower threshold they give something, which is not the seed.
    assert shares.combine({x: dealt[x] for x in (1, 2, 3)}, 3) != bytes(16)


def test_the_polynomial_is_over_gf_2_128_with_the_positions_as_x() -> None:
    """x^128 + x^7 + x^2 + x + 1; the shares of a threshold of 2 lie on a line."""

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(128):
            if b >> bit & 1:
                product ^= a << bit
        for bit in reversed(range(128, 256)):
            if product >> bit & 1:
                product ^= ((1 << 128) | 0x87) << (bit - 128)
        return product

    seed = os.urandom(16)
    dealt = {x: int.from_bytes(y, "big") for x, y in shares.split(seed, 2, 15).items()}
    slope = dealt[1] ^ int.from_bytes(seed, "big")
    assert all(y == int.from_bytes(seed, "big") ^ times(slope, x) for x, y in dealt.items())


def test_splitting_again_gives_other_shares() -> None:
    assert shares.split(bytes(16), 3, 4) != shares.split(bytes(16), 3, 4)


@pytest.mark.parametrize(("seed", "t", "n"), [(bytes(15), 2, 3), (bytes(16), 1, 3), (bytes(16), 4, 3)])
def test_what_cannot_be_shared_is_refused(seed: bytes, t: int, n: int) -> None:
    with pytest.raises(FedmeshError):
        shares.split(seed, t, n)


def test_a_share_at_zero_would_be_the_seed_and_does_not_exist() -> None:
    with pytest.raises(FedmeshError):
        shares.combine({0: bytes(16), 1: bytes(16)}, 2)


def test_a_box_opens_for_its_recipient_direction_and_context_only() -> None:
    a, b, c = (X25519PrivateKey.generate() for _ in range(3))
    public = {key: key.public_key().public_bytes_raw() for key in (a, b, c)}
    pair = SharePair(os.urandom(16), os.urandom(16))
    box = shares.seal(pair, a, public[b], b"a to b")
    assert len(box) == 60
    assert shares.open_box(box, b, public[a], b"a to b") == pair
    assert shares.open_box(box, b, public[a], b"b to a") is None
    assert shares.open_box(box, c, public[a], b"a to b") is None
    assert shares.open_box(box, b, public[c], b"a to b") is None
    for i in range(len(box)):
        assert shares.open_box(box[:i] + bytes([box[i] ^ 1]) + box[i + 1 :], b, public[a], b"a to b") is None
