"""That a group key hides what it encrypts. A key of ones encrypts and decrypts without a fault, and hides nothing."""

from typing import Any

import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, epoch, ring, secret, uniform, wire
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import layout_of
from tests.support.secure_sum import make_keys, make_roster

LAYOUT = layout_of(DEFAULT.name, 4096, 1)
HEADER = 40


def coefficients(group_key: bytes) -> Any:
    return wire.unpack(np.frombuffer(group_key, dtype=np.uint8, offset=HEADER), DEFAULT)


def degenerate(group_key: bytes, values: Any) -> bytes:
    return group_key[:HEADER] + wire.pack(np.asarray(values, dtype=np.uint64)).tobytes()


def readable_without_key(group_key: bytes, values: Any) -> float:
    """The share of values that follow from an upload alone, by rounding t * (c0 + c1) / q: the key taken to be 1."""
    (segment,) = secret.encrypt_segments(values, group_key, LAYOUT)
    c0, seeds = wire.split_upload(LAYOUT, 0, segment)
    c0 = ring.reduce(c0 + uniform.expand(seeds[0].tobytes(), DEFAULT), DEFAULT)
    q, t = DEFAULT.coeff_modulus, DEFAULT.plain_modulus
    guessed = np.array([(int(value) * t + q // 2) // q % t for value in c0], dtype=np.uint64)
    seen = encoding.decode(guessed.reshape(1, -1), DEFAULT, 1, values.size)
    return float(np.mean(seen == values))


def test_a_fresh_key_looks_uniform_and_no_two_are_alike() -> None:
    keys = [coefficients(secret.generate_group_key()) for _ in range(3)]
    for key in keys:
        assert np.count_nonzero(key) == np.unique(key).size == DEFAULT.poly_modulus_degree
        assert 0.45 < np.mean(key > DEFAULT.coeff_modulus // 2) < 0.55
    assert not np.any(keys[0] == keys[1])
    assert not np.any(keys[1] == keys[2])


def test_an_upload_says_nothing_without_the_key() -> None:
    values = np.random.default_rng(1).integers(-(10**6), 10**6, 4096)
    assert readable_without_key(secret.generate_group_key(), values) < 0.01


def test_the_reading_would_succeed_under_a_key_of_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(secret, "_require_sound", lambda _coefficients: None)
    values = np.random.default_rng(1).integers(-(10**6), 10**6, 4096)
    # 1 in NTT form.
    ones = degenerate(secret.generate_group_key(), np.ones(4096))
    assert readable_without_key(ones, values) > 0.99


@pytest.mark.parametrize("values", [np.zeros(4096), np.ones(4096), np.r_[7, 9, np.zeros(4094)]], ids=str)
def test_degenerate_keys_are_refused_wherever_they_come_in(values: Any) -> None:
    key = degenerate(secret.generate_group_key(), values)
    plain = np.zeros(4096, dtype=np.int64)
    for use in (
        lambda: secret.require_sound_key(key),
        lambda: list(secret.encrypt_segments(plain, key, LAYOUT)),
        lambda: secret.decrypt_segments([bytes(LAYOUT.sum_segment_bytes(0))], key, LAYOUT),
    ):
        with pytest.raises(FedmeshError) as caught:
            use()
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_maker_cannot_hand_out_a_degenerate_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make_keys(4)
    roster = make_roster(keys)
    zeros = degenerate(secret.generate_group_key(), np.zeros(4096))
    monkeypatch.setattr(secret, "generate_group_key", lambda _params: zeros)
    _, signed = epoch.make_epoch(keys[0], roster, 1)
    with pytest.raises(FedmeshError, match="degenerate") as caught:
        epoch.open_epoch(signed, keys[1], roster)
    assert caught.value.detail["culprit"] == keys[0].hospital_id
