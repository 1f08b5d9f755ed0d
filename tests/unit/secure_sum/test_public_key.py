"""The parameter set with a public key: exact sums, the noise that its t allows for, and keys that cannot decrypt."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, masks, public, ring, secret, uniform, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.encryption import Encryptor, PublicEncryptor
from services.secure_sum.parameters import (
    BFV_N4096_Q60_T44_PK_V1,
    DEFAULT,
    ParameterSet,
    parameter_set,
    parameter_set_names,
    public_key_sets,
)
from services.secure_sum.public_key import FORM, PublicKey
from services.secure_sum.wire import Layout

PUBLIC = BFV_N4096_Q60_T44_PK_V1
N, Q = PUBLIC.poly_modulus_degree, PUBLIC.coeff_modulus
KEY = secret.generate_group_key()
PUBLIC_KEY = secret.make_public_key(KEY)
ENCRYPTOR = PublicEncryptor(PUBLIC_KEY)
SETS = [parameter_set(name) for name in parameter_set_names()]
# What `secret.require_public_key` lets the error of a public key have, and a ternary secret.
MOST_ERROR_SQUARED, MOST_SECRET_SQUARED = 16 * N, N


def encryptor_of(params: ParameterSet) -> Encryptor:
    return ENCRYPTOR if params.public_key else secret.SecretEncryptor(KEY)


def masked_sum(layout: Layout, vectors: Sequence[Int64Vector], rng: np.random.Generator) -> list[bytes]:
    """Upload every vector under masks of its own, and take them off the sum as the aggregator does."""
    plans: list[masks.MaskPlan] = [((rng.bytes(32), 1), (rng.bytes(32), -1)) for _ in vectors]
    uploads = [list(encryptor_of(layout.params).zeros(layout)) for _ in vectors]
    total = []
    for index in range(layout.segments):
        start, size = layout.values(index)
        masked = [
            public.add_masked(
                layout, index, upload[index], vector[start : start + size], masks.of_segment(plan, layout, index)
            )
            for upload, vector, plan in zip(uploads, vectors, plans, strict=True)
        ]
        assert {len(segment) for segment in masked} == {layout.upload_segment_bytes(index)}
        total.append(public.sum_segment(layout, index, masked, masks.of_segment(sum(plans, ()), layout, index)))
    return total


def require_exact(params: ParameterSet, lanes: int, hospitals: int, size: int) -> None:
    rng = np.random.default_rng(hospitals)
    limit = encoding.contribution_limit(params, lanes, hospitals)
    vectors = [rng.choice(np.array([-limit, 1 - limit, -1, 0, 1, limit]), size) for _ in range(hospitals)]
    for vector in vectors:
        vector[:2] = -limit, limit
    layout = Layout(params, size, lanes)
    reached = secret.decrypt_segments(masked_sum(layout, vectors, rng), KEY, layout)
    assert reached.tolist() == [sum(column) for column in zip(*(v.tolist() for v in vectors), strict=True)]


@pytest.mark.parametrize("hospitals", [11, 15])
@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("params", SETS, ids=lambda params: params.name)
def test_sums_of_extremes_are_exact_under_every_set(params: ParameterSet, lanes: int, hospitals: int) -> None:
    require_exact(params, lanes, hospitals, 2501)


@pytest.mark.slow
@pytest.mark.parametrize("hospitals", [12, 13, 14, 16])
@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [65_535, 131_073])
@pytest.mark.parametrize("params", SETS, ids=lambda params: params.name)
def test_sums_around_a_segment_are_exact_under_every_set(
    params: ParameterSet, size: int, lanes: int, hospitals: int
) -> None:
    require_exact(params, lanes, hospitals, size)


def test_lanes_are_those_of_the_set() -> None:
    assert [encoding.lane_bits(PUBLIC, lanes) for lanes in encoding.LANES] == [44, 22]
    room = (1 << 21) - 1
    assert encoding.choose_lanes(PUBLIC, room // 15, 15, 0.0, 2000) == 2
    assert encoding.choose_lanes(PUBLIC, room // 15 + 1, 15, 0.0, 2000) == 1
    assert encoding.choose_lanes(DEFAULT, room // 15 + 1, 15, 0.0, 2000) == 2
    with pytest.raises(FedmeshError, match="44-bit"):
        encoding.choose_lanes(PUBLIC, 1 << 40, 15, 0.0, 2000)


@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [1, 2, 3, 8193, 140_001])
def test_an_upload_is_as_large_as_a_sum(size: int, lanes: int) -> None:
    layout = Layout(PUBLIC, size, lanes)
    assert layout.upload_bytes == layout.sum_bytes
    segments = range(layout.segments)
    assert [layout.upload_segment_bytes(i) for i in segments] == [layout.sum_segment_bytes(i) for i in segments]
    # A gRPC message has room for it.
    assert layout.upload_segment_bytes(0) <= 983_040


def phase(layout: Layout, segment: bytes) -> Int64Vector:
    """c0 + c1*s of a segment of a sum, in (-q/2, q/2): the noise, where zeros were added."""
    c0, c1 = wire.split_sum(layout, 0, segment)
    with secret._multiplier(layout.params, KEY) as times_key:
        product = times_key(c1).reshape(-1)[: c0.size]
    return secret._centred(ring.reduce(c0 + product, layout.params), layout.params)


def variance_bound(uploads: int) -> float:
    """Of docs/secure-sum.md: variance proxy of a coefficient of a sum's noise, for any keys that members accept."""
    return uploads * (2 / 3 * MOST_ERROR_SQUARED + 10.5 * MOST_SECRET_SQUARED + 10.5)


def log2_failure(plain_modulus_bits: int, uploads: int) -> float:
    """log2 of a bound of the chance that any coefficient of the longest vector decrypts wrongly."""
    room = Q / (1 << (plain_modulus_bits + 1)) - (uploads + 1) / 2
    tail = 1 - room * room / (2 * variance_bound(uploads)) * math.log2(math.e)
    return tail + math.log2(PUBLIC.max_vector_length)


def test_the_plaintext_modulus_is_the_largest_that_never_fails() -> None:
    bits = PUBLIC.plain_modulus_bits
    assert [log2_failure(bits, k) < -500 for k in (15, PUBLIC.max_contributions)] == [True, True]
    # The next one with two lanes of whole bits would fail, and so would the first set's.
    assert log2_failure(bits + 2, 15) > -40
    assert log2_failure(DEFAULT.plain_modulus_bits, 15) > 0


def test_the_measured_noise_is_that_of_the_derivation() -> None:
    layout, uploads = Layout(PUBLIC, 4 * N, 1), 15
    zero = np.zeros(4 * N, dtype=np.uint64)
    noise = phase(layout, public.sum_segment(layout, 0, [next(ENCRYPTOR.zeros(layout)) for _ in range(uploads)], zero))
    b, a = PUBLIC_KEY.polynomials()
    one = np.zeros_like(a)
    one[0] = 1
    with secret._multiplier(PUBLIC, KEY) as times_key:
        product, key = times_key(np.stack((a, one)))
    error, key = secret._centred(ring.reduce(b + product, PUBLIC), PUBLIC), secret._centred(key, PUBLIC)
    expected = uploads * (2 / 3 * float(error @ error) + 10.5 * float(key @ key) + 10.5)
    # 16,384 samples give the variance to about one percent.
    assert 0.9 * expected < noise.var() < 1.1 * expected
    assert expected < variance_bound(uploads)
    assert 225 < math.sqrt(expected / uploads) < 255
    assert np.abs(noise).max() < 8 * math.sqrt(variance_bound(uploads)) < Q / (2 * PUBLIC.plain_modulus) / 3


def test_every_ciphertext_is_fresh() -> None:
    layout = Layout(PUBLIC, 6 * N, 2)
    found: list[Coefficients] = []
    for _ in range(2):
        c0, c1 = wire.split_sum(layout, 0, next(ENCRYPTOR.zeros(layout)))
        found += [*c0.reshape(3, N), *c1]
    assert len({row.tobytes() for row in found}) == 12
    # Two that were related would differ by something small or be the same somewhere.
    assert all(np.count_nonzero(one == other) < 3 for one, other in pairwise(found))


def test_what_encrypts_holds_the_public_key_only_and_cannot_decrypt() -> None:
    assert vars(ENCRYPTOR) == {"_key": PUBLIC_KEY}
    assert vars(PUBLIC_KEY) == {"data": PUBLIC_KEY.data}
    values = np.arange(-N, N, dtype=np.int64)
    layout = Layout(PUBLIC, 2 * N, 2)
    total = masked_sum(layout, [values], np.random.default_rng(1))
    assert np.array_equal(secret.decrypt_segments(total, KEY, layout), values)
    header = KEY[: len(KEY) - wire.packed_size(N)]
    for polynomial in PUBLIC_KEY.polynomials():
        as_key = header + wire.pack(polynomial).tobytes()
        assert np.mean(secret.decrypt_segments(total, as_key, layout) == values) < 0.01


def test_each_set_is_encrypted_in_its_own_way_only() -> None:
    assert public_key_sets() == (PUBLIC.name,)
    for refused in (
        lambda: ENCRYPTOR.zeros(Layout(DEFAULT, 10, 2)),
        lambda: secret.SecretEncryptor(KEY).zeros(Layout(PUBLIC, 10, 2)),
        lambda: secret.encrypt_segments(np.zeros(10, np.int64), KEY, Layout(PUBLIC, 10, 2)),
    ):
        with pytest.raises(FedmeshError, match=r"not encrypted under this key|the public key encrypts") as caught:
            refused()
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "data",
    [b"", PUBLIC_KEY.data[:-1], PUBLIC_KEY.data + b"\0", b"\xff" * 15 + PUBLIC_KEY.data[15:]],
    ids=["empty", "short", "long", "not below q"],
)
def test_what_is_no_public_key_is_refused(data: bytes) -> None:
    with pytest.raises(FedmeshError, match="not a public key") as caught:
        PublicKey.from_bytes(data)
    assert caught.value.code is Code.INVALID_ARGUMENT


def with_error(change: Coefficients) -> PublicKey:
    """The public key with more error: b + change."""
    b, seeds = wire.split_upload(FORM, 0, PUBLIC_KEY.data)
    return PublicKey.from_bytes(wire.join(ring.reduce(b + change, DEFAULT), seeds))


def test_a_public_key_of_another_secret_or_with_much_error_is_refused() -> None:
    secret.require_public_key(KEY, PUBLIC_KEY)
    spike = np.zeros(N, dtype=np.uint64)
    spike[7] = 43
    wide = np.where(np.arange(N) % 2 == 0, np.uint64(8), np.uint64(Q - 8))
    for bad in (secret.make_public_key(secret.generate_group_key()), with_error(spike), with_error(wide)):
        with pytest.raises(FedmeshError, match="does not belong") as caught:
            secret.require_public_key(KEY, bad)
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_secret_that_is_not_ternary_is_refused() -> None:
    """It would multiply the noise of uploads, and is sound by every other look."""
    header, large = KEY[: len(KEY) - wire.packed_size(N)], uniform.expand(bytes(32), DEFAULT)
    key = header + wire.pack(large).tobytes()
    secret.require_sound_key(key)
    with pytest.raises(FedmeshError, match="does not belong"):
        secret.require_public_key(key, secret.make_public_key(key))
