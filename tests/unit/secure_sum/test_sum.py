"""The sum is exact: against integers added independently, with masks, at the edges of lanes and segments."""

import subprocess
import sys
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, public, ring, seal, secret, uniform, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout, layout_of
from tests.support.seal_keys import load_key

KEY = secret.generate_group_key()
SEGMENT = 65536
"""Coefficients of a segment."""


def layout(size: int, lanes: int = 2) -> Layout:
    return layout_of(DEFAULT.name, size, lanes)


def masked_sum(vectors: Sequence[Int64Vector], lanes: int, seed: int = 0) -> list[bytes]:
    """Upload every vector under a random mask, and take the masks off the sum."""
    rng = np.random.default_rng(seed)
    form = layout(vectors[0].size, lanes)
    uploads = [secret.encrypt_zeros(KEY, form) for _ in vectors]
    total = []
    for index in range(form.segments):
        count = form.coefficients(index)[1]
        start, size = form.values(index)
        parts = [vector[start : start + size] for vector in vectors]
        masks = rng.integers(0, DEFAULT.plain_modulus, (len(vectors), count), dtype=np.uint64)
        masks[:, :1] = DEFAULT.plain_modulus - 1
        masked = [
            public.add_masked(form, index, next(zeros), part, mask)
            for zeros, part, mask in zip(uploads, parts, masks, strict=True)
        ]
        correction: Coefficients = masks.sum(axis=0) % np.uint64(DEFAULT.plain_modulus)
        total.append(public.sum_segment(form, index, masked, correction))
    assert all(next(upload, None) is None for upload in uploads)
    return total


def opened(total: Sequence[bytes], size: int, lanes: int) -> Int64Vector:
    return secret.decrypt_segments(iter(total), KEY, layout(size, lanes))


def extremes(rng: np.random.Generator, size: int, lanes: int, hospitals: int) -> list[Int64Vector]:
    limit = encoding.contribution_limit(DEFAULT, lanes, hospitals)
    return [rng.choice(np.array([-limit, 1 - limit, -1, 0, 1, limit]), size) for _ in range(hospitals)]


@given(
    seed=st.integers(0, 2**32),
    hospitals=st.integers(1, 16),
    size=st.sampled_from([1, 2, 3, 97, 4095, 4096, 4097, 8191, 8192, 8193, 16384]),
    lanes=st.sampled_from(encoding.LANES),
    extreme=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_sum_is_exact(seed: int, hospitals: int, size: int, lanes: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    limit = encoding.contribution_limit(DEFAULT, lanes, hospitals)
    vectors = extremes(rng, size, lanes, hospitals)
    if not extreme:
        vectors = [rng.integers(-limit, limit + 1, size) for _ in range(hospitals)]
    result = opened(masked_sum(vectors, lanes, seed), size, lanes)
    assert result.dtype == np.int64
    assert np.array_equal(result, np.sum(vectors, axis=0))


BOUNDARIES = [1, 2, 4096, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT - 1, 2 * SEGMENT, 2 * SEGMENT + 1]


@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", BOUNDARIES)
def test_the_sum_is_exact_around_a_segment(size: int, lanes: int) -> None:
    vectors = extremes(np.random.default_rng(size), size, lanes, 2)
    assert np.array_equal(opened(masked_sum(vectors, lanes), size, lanes), np.sum(vectors, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("hospitals", range(11, 17))
@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [*BOUNDARIES, 4 * SEGMENT + 1])
def test_the_sum_of_a_whole_cohort_is_exact_around_a_segment(size: int, lanes: int, hospitals: int) -> None:
    vectors = extremes(np.random.default_rng(size), size, lanes, hospitals)
    assert np.array_equal(opened(masked_sum(vectors, lanes), size, lanes), np.sum(vectors, axis=0))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("hospitals", [11, 16])
def test_a_cohort_at_the_limit_is_exact(lanes: int, sign: int, hospitals: int) -> None:
    limit = encoding.contribution_limit(DEFAULT, lanes, hospitals)
    vector = np.full(8192, sign * limit)
    result = opened(masked_sum([vector] * hospitals, lanes), 8192, lanes)
    assert np.array_equal(result, hospitals * vector)


@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [1, 2, 3, 2049, 8192, 8193, 140_001])
def test_sizes_are_known_beforehand(size: int, lanes: int) -> None:
    form = layout(size, lanes)
    upload = list(secret.encrypt_segments(np.zeros(size, np.int64), KEY, form))
    total = masked_sum([np.zeros(size, np.int64)], lanes)
    assert [len(segment) for segment in upload] == [form.upload_segment_bytes(i) for i in range(form.segments)]
    assert [len(segment) for segment in total] == [form.sum_segment_bytes(i) for i in range(form.segments)]
    assert sum(map(len, upload)) == form.upload_bytes
    assert sum(map(len, total)) == form.sum_bytes


def test_a_segment_fits_a_message_and_an_upload_is_smaller_than_float32() -> None:
    form = layout(1_000_000)
    assert form.upload_segment_bytes(0) == 492_032
    assert form.sum_segment_bytes(0) == 983_040
    assert form.upload_bytes / 1_000_000 < 3.76
    assert layout(2000).upload_bytes / 2000 < 3.9


def test_the_segments_of_a_layout_cover_the_vector() -> None:
    form = layout(300_001, 2)
    assert [form.coefficients(i) for i in range(3)] == [(0, SEGMENT), (SEGMENT, SEGMENT), (2 * SEGMENT, 18_930)]
    assert [form.values(i) for i in range(3)] == [(0, 2 * SEGMENT), (2 * SEGMENT, 2 * SEGMENT), (4 * SEGMENT, 37_857)]
    for index in (-1, 3):
        with pytest.raises(FedmeshError, match="segments 0 to 2"):
            form.coefficients(index)


def test_the_sum_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(1)
    form = layout(3000)
    uploads = [next(secret.encrypt_segments(rng.integers(-9, 9, 3000), KEY, form)) for _ in range(4)]
    correction = rng.integers(0, DEFAULT.plain_modulus, 1500, dtype=np.uint64)
    sums = {
        public.sum_segment(form, 0, order, correction) for order in (uploads, uploads[::-1], uploads[2:] + uploads[:2])
    }
    assert len(sums) == 1


def test_encrypting_twice_differs_and_hides_the_values() -> None:
    values = np.zeros(8192, np.int64)
    first, second = (next(secret.encrypt_segments(values, KEY, layout(8192))) for _ in range(2))
    same = np.mean(np.frombuffer(first, np.uint8) == np.frombuffer(second, np.uint8))
    assert same < 0.01  # independent bytes agree once in 256


def test_every_ciphertext_has_a_seed_and_errors_of_its_own() -> None:
    """Two under the same c1, or the same errors, would give away the difference of what they hold."""
    form, seeds, rows = layout(2 * SEGMENT + 2 * 4096), [], []
    half = DEFAULT.coeff_modulus // 2
    for _ in range(2):
        for index, segment in enumerate(secret.encrypt_zeros(KEY, form)):
            c0, found = wire.split_upload(form, index, segment)
            seeds += [seed.tobytes() for seed in found]
            c1 = np.stack([uniform.expand(seed.tobytes(), DEFAULT) for seed in found])
            with secret._multiplier(DEFAULT, KEY) as times_key:
                phase = ring.reduce(c0.reshape(c1.shape) + times_key(c1), DEFAULT).astype(np.int64)
            rows += list(np.where(phase > half, phase - DEFAULT.coeff_modulus, phase))
    assert len(rows) == len(seeds) == len(set(seeds)) == 2 * form.ciphertexts == 2 * 17
    assert len({row.tobytes() for row in rows}) == len(rows)
    for row in rows:
        assert np.abs(row).max() <= 21
        assert 8 < row.var() < 13
    # The same errors at other places would correlate.
    assert np.abs(np.corrcoef(np.stack(rows)) - np.eye(len(rows))).max() < 0.12


def test_a_masked_upload_decrypts_to_noise() -> None:
    values = np.arange(8192, dtype=np.int64)
    form = layout(8192)
    mask = np.random.default_rng(5).integers(0, DEFAULT.plain_modulus, 4096, dtype=np.uint64)
    masked = public.add_masked(form, 0, next(secret.encrypt_zeros(KEY, form)), values, mask)
    alone = public.sum_segment(form, 0, [masked], np.zeros(4096, dtype=np.uint64))
    assert np.mean(opened([alone], 8192, 2) == values) < 0.01


def test_values_and_mask_are_scaled_as_one() -> None:
    """Two roundings would leave a trace of the values in the noise: see tests/simulation/collusion."""
    form, values = layout(8192), np.arange(-4096, 4096, dtype=np.int64)
    mask = np.random.default_rng(6).integers(0, DEFAULT.plain_modulus, 4096, dtype=np.uint64)
    zeros = next(secret.encrypt_zeros(KEY, form))
    plain = (encoding.encode(values, DEFAULT, 2).reshape(-1) + mask) % np.uint64(DEFAULT.plain_modulus)
    assert public.add_masked(form, 0, zeros, values, mask) == public.add_mask(form, 0, zeros, plain)


@pytest.mark.parametrize(("values", "masks"), [(8191, 4096), (8193, 4096), (8192, 4095)])
def test_values_and_mask_must_fit_the_segment(values: int, masks: int) -> None:
    form = layout(8192)
    zeros = next(secret.encrypt_zeros(KEY, form))
    with pytest.raises(FedmeshError, match="segment 0 takes") as caught:
        public.add_masked(form, 0, zeros, np.zeros(values, np.int64), np.zeros(masks, np.uint64))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_only_as_many_uploads_as_the_set_allows_are_added() -> None:
    form = layout(10)
    upload = next(secret.encrypt_segments(np.ones(10, np.int64), KEY, form))
    correction = np.zeros(6, dtype=np.uint64)
    assert public.sum_segment(form, 0, [upload] * 16, correction)
    for count in (0, 17):
        with pytest.raises(FedmeshError, match="1 to 16") as caught:
            public.sum_segment(form, 0, [upload] * count, correction)
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_adding_holds_as_much_for_sixteen_uploads_as_for_four() -> None:
    form = layout(SEGMENT * 2)
    upload = next(secret.encrypt_zeros(KEY, form))
    correction = np.zeros(SEGMENT, np.uint64)

    def held(count: int) -> int:
        tracemalloc.start()
        try:
            public.sum_segment(form, 0, (bytes(bytearray(upload)) for _ in range(count)), correction)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert held(16) < held(4) + len(upload) // 2


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(5, np.uint64),
        np.zeros(7, np.uint64),
        np.zeros(6, np.int64),
        np.zeros((6, 1), np.uint64),
        np.full(6, DEFAULT.plain_modulus, np.uint64),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Coefficients) -> None:
    form = layout(10)
    upload = next(secret.encrypt_segments(np.ones(10, np.int64), KEY, form))
    with pytest.raises(FedmeshError) as masking:
        public.add_mask(form, 0, upload, mask)
    with pytest.raises(FedmeshError) as adding:
        public.sum_segment(form, 0, [upload], mask)
    assert masking.value.code is adding.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "values", [np.ones(9, np.int64), np.ones(10, np.int32), np.full(10, 1 << 23), np.ones((10, 1), np.int64)]
)
def test_what_cannot_be_encrypted_is_refused_at_once(values: Int64Vector) -> None:
    with pytest.raises(FedmeshError) as caught:
        secret.encrypt_segments(values, KEY, layout(10))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_another_key_decrypts_to_noise_and_another_digest() -> None:
    values = np.arange(4000, dtype=np.int64)
    total = masked_sum([values], 2)
    wrong = secret.decrypt_segments(total, secret.generate_group_key(), layout(4000))
    assert np.mean(wrong == values) < 0.01
    digest = bytes(32)
    context = secret.round_context("job", 3, 1)
    assert secret.keyed_digest(KEY, context, digest, wrong) != secret.keyed_digest(KEY, context, digest, values)


def test_the_digest_binds_everything() -> None:
    values = np.arange(5, dtype=np.int64)
    cipher = bytes(32)
    context = secret.round_context("job", 3, 1)
    base = secret.keyed_digest(KEY, context, cipher, values)
    assert len(base) == 32
    assert base == secret.keyed_digest(KEY, secret.round_context("job", 3, 1), cipher, values.copy())
    others = [
        secret.keyed_digest(secret.generate_group_key(), context, cipher, values),
        secret.keyed_digest(KEY, secret.round_context("job2", 3, 1), cipher, values),
        secret.keyed_digest(KEY, secret.round_context("job", 4, 1), cipher, values),
        secret.keyed_digest(KEY, secret.round_context("job", 3, 2), cipher, values),
        secret.keyed_digest(KEY, context, b"\1" + bytes(31), values),
        secret.keyed_digest(KEY, context, cipher, values + 1),
        secret.keyed_digest(KEY, context, cipher, values[:4]),
    ]
    assert len({base, *others}) == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda k: k[:-1],
        lambda k: k + b"\0",
        lambda k: k[:20],
        lambda k: b"",
        lambda k: b"XXXX" + k[4:],
        lambda k: k[:4] + b"\2" + k[5:],
        lambda k: k[:8] + b"no-such-set".ljust(32, b"\0") + k[40:],
    ],
)
def test_a_damaged_group_key_is_refused(damage) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FedmeshError) as caught:
        secret.encrypt_segments(np.ones(10, np.int64), damage(KEY), layout(10))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_every_group_key_is_another_one() -> None:
    # The bindings once returned the memory of a key that was gone already: now and then the key before.
    keys = [secret.generate_group_key() for _ in range(100)]
    assert len(set(keys)) == len(keys)


def test_compressed_ciphertexts_are_read_too() -> None:
    low_entropy = np.zeros((2, 4096), np.uint64)
    low_entropy[1] = 7
    with seal.memory_file() as file:
        loaded = seal.load_ciphertext(DEFAULT, file, low_entropy)
        assert np.array_equal(seal.save_ciphertext(DEFAULT, file, loaded), low_entropy)
        assert len(file.read()) < 4096  # so zstd did compress it


def test_seal_agrees_with_the_parameters_and_the_noise_bound() -> None:
    context = seal.context(DEFAULT)
    assert context.first_context_data().qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC192
    form = layout(8192)
    mask = np.full(4096, 12_345_678_901, dtype=np.uint64)
    upload = public.add_mask(form, 0, next(secret.encrypt_segments(np.full(8192, 5), KEY, form)), mask)
    total = public.sum_segment(form, 0, [upload] * 16, mask * np.uint64(16))
    c0, c1 = wire.split_sum(form, 0, total)
    with seal.memory_file() as file:
        ciphertext = seal.load_ciphertext(DEFAULT, file, np.stack((c0, c1[0])))
        decryptor = sealapi.Decryptor(context, load_key(KEY, file))
        # The same upload sixteen times: noise adds coherently, to at most 352.5 of the 2047 allowed: log2 = 2.5 bits.
        assert decryptor.invariant_noise_budget(ciphertext) >= 2


def test_the_aggregators_side_loads_no_secret_code() -> None:
    code = (
        "import sys, services.secure_sum.public, services.secure_sum.disposable;"
        "heavy = ('services.secure_sum.secret', 'tenseal', 'tensorflow', 'torch', 'scipy');"
        "bad = [m for m in sys.modules if m in heavy"
        " or m.startswith('services.privacy')]; sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
