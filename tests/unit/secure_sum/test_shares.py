import itertools
import os

import pytest
from Crypto.Protocol.SecretSharing import Shamir, _Element
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

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


sizes = st.integers(2, 12).flatmap(lambda n: st.tuples(st.integers(2, n), st.just(n)))
values = st.binary(min_size=16, max_size=16)


@settings(max_examples=30, deadline=None)
@given(st.data(), values, sizes)
def test_pycryptodome_combines_what_is_split_here(data: st.DataObject, seed: bytes, size: tuple[int, int]) -> None:
    t, n = size
    dealt = shares.split(seed, t, n)
    chosen = data.draw(st.permutations(sorted(dealt)))[:t]
    assert Shamir.combine([(x, dealt[x]) for x in chosen]) == seed
    assert shares.combine({x: dealt[x] for x in chosen}, t) == seed


@settings(max_examples=30, deadline=None)
@given(values, sizes)
def test_what_pycryptodome_split_is_combined_here(seed: bytes, size: tuple[int, int]) -> None:
    t, n = size
    dealt = dict(Shamir.split(t, n, seed))
    assert shares.combine(dealt, t) == seed
    assert shares.combine(dict(reversed(dealt.items())), t) == seed


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(1, 64) | st.integers(1, (1 << 128) - 1), values, min_size=1, max_size=11))
def test_shares_on_no_polynomial_give_what_pycryptodome_gives(held: dict[int, bytes]) -> None:
    assert shares.combine(held, len(held)) == Shamir.combine(list(held.items()))


@pytest.mark.parametrize("zeros", range(0, 129, 8))
def test_a_share_has_16_bytes_whatever_it_is(zeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With coefficients of 0, every share is the seed itself."""
    monkeypatch.setattr(os, "urandom", bytes)
    seed = ((1 << (128 - zeros)) - 1).to_bytes(16, "big")
    dealt = shares.split(seed, 3, 5)
    assert set(dealt.values()) == {seed}
    assert shares.combine(dealt, 3) == seed


def test_every_coefficient_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def urandom(size: int) -> bytes:
        drawn.append(os.getrandom(size))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    seed = bytes(range(16))
    for _ in range(2):
        dealt = shares.split(seed, 4, 6)
        coefficients = [drawn[-1][i : i + 16] for i in (0, 16, 32)]
        for x, share in dealt.items():
            value = _Element(0)
            for coefficient in reversed([seed, *coefficients]):
                value = _Element(x) * value + _Element(coefficient)
            assert share == value.encode()
    assert [len(piece) for piece in drawn] == [48, 48]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("share", [b"", bytes(15), bytes(17)])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(FedmeshError) as caught:
        shares.combine({1: bytes(16), 2: share}, 2)
    assert caught.value.code is Code.INVALID_ARGUMENT
