import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, public, seal, secret, wire
from services.secure_sum.encoding import Int64Vector
from services.secure_sum.parameters import DEFAULT

KEY = secret.generate_group_key()


def summed(vectors: list[Int64Vector], lanes: int) -> bytes:
    total: bytes | None = None
    for vector in vectors:
        total = public.add(total, secret.encrypt(vector, KEY, lanes), DEFAULT, vector.size, lanes)
    assert total is not None
    return total


@given(
    seed=st.integers(0, 2**32),
    hospitals=st.integers(1, 16),
    size=st.sampled_from([1, 2, 3, 97, 4096, 4097, 8191, 8192, 8195, 16384]),
    lanes=st.sampled_from(encoding.LANES),
    extreme=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_sum_is_exact(seed: int, hospitals: int, size: int, lanes: int, extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    limit = encoding.contribution_limit(DEFAULT, lanes, hospitals)
    if extreme:
        vectors = [rng.choice(np.array([-limit, -1, 0, 1, limit]), size) for _ in range(hospitals)]
    else:
        vectors = [rng.integers(-limit, limit + 1, size) for _ in range(hospitals)]
    result = secret.decrypt(summed(vectors, lanes), KEY, size, lanes)
    assert result.dtype == np.int64
    assert np.array_equal(result, np.sum(vectors, axis=0))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("lanes", encoding.LANES)
def test_sixteen_hospitals_at_the_limit_are_exact(lanes: int, sign: int) -> None:
    limit = encoding.contribution_limit(DEFAULT, lanes, 16)
    vector = np.full(8192, sign * limit)
    assert np.array_equal(secret.decrypt(summed([vector] * 16, lanes), KEY, 8192, lanes), 16 * vector)


@pytest.mark.parametrize("lanes", encoding.LANES)
@pytest.mark.parametrize("size", [1, 2, 3, 2049, 8192, 8193, 100_000])
def test_sizes_are_known_beforehand(size: int, lanes: int) -> None:
    upload = secret.encrypt(np.zeros(size, np.int64), KEY, lanes)
    assert len(upload) == wire.upload_size(DEFAULT, size, lanes)
    assert len(public.add(None, upload, DEFAULT, size, lanes)) == wire.sum_size(DEFAULT, size, lanes)


def test_an_upload_is_smaller_than_float32() -> None:
    assert wire.upload_size(DEFAULT, 1_000_000) / 1_000_000 < 3.8
    assert wire.upload_size(DEFAULT, 2000) / 2000 < 3.9


def test_the_sum_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(1)
    uploads = [secret.encrypt(rng.integers(-9, 9, 3000), KEY) for _ in range(4)]
    sums = []
    for order in (uploads, uploads[::-1]):
        total = None
        for upload in order:
            total = public.add(total, upload, DEFAULT, 3000)
        sums.append(total)
    assert sums[0] == sums[1]


def test_encrypting_twice_differs_and_hides_the_values() -> None:
    values = np.zeros(8192, np.int64)
    first, second = (secret.encrypt(values, KEY)[wire.HEADER_BYTES :] for _ in range(2))
    same = np.mean(np.frombuffer(first, np.uint8) == np.frombuffer(second, np.uint8))
    assert same < 0.01  # independent bytes agree once in 256


def test_a_seventeenth_contribution_is_refused() -> None:
    upload = secret.encrypt(np.ones(10, np.int64), KEY)
    total = None
    for _ in range(16):
        total = public.add(total, upload, DEFAULT, 10)
    assert total is not None
    assert public.validate_sum(total, DEFAULT, 10) == 16
    with pytest.raises(FedmeshError, match="at most 16") as caught:
        public.add(total, upload, DEFAULT, 10)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_validating_returns_the_hash() -> None:
    upload = secret.encrypt(np.ones(10, np.int64), KEY)
    assert public.validate_upload(upload, DEFAULT, 10) == hashlib.sha256(upload).digest()


def test_another_key_decrypts_to_noise_and_another_digest() -> None:
    values = np.arange(4000, dtype=np.int64)
    total = summed([values], 2)
    wrong = secret.decrypt(total, secret.generate_group_key(), 4000)
    assert np.mean(wrong == values) < 0.01
    digest = hashlib.sha256(total).digest()
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
        secret.encrypt(np.ones(10, np.int64), damage(KEY))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_every_group_key_is_another_one() -> None:
    # The bindings once returned the memory of a key that was gone already: now and then the key before.
    keys = [secret.generate_group_key() for _ in range(100)]
    assert len(set(keys)) == len(keys)


def test_compressed_ciphertexts_are_read_too() -> None:
    low_entropy = np.zeros((2, 4096), np.uint64)
    low_entropy[1] = 7
    with seal.memory_file() as file:
        loaded = seal.load_full(DEFAULT, file, low_entropy)
        assert np.array_equal(seal.save_full(DEFAULT, file, loaded), low_entropy)
        assert len(file.read()) < 4096  # so zstd did compress it


def test_seal_agrees_with_the_parameters_and_the_noise_bound() -> None:
    context = seal.context(DEFAULT)
    assert context.first_context_data().qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC192
    size = 8192
    upload = secret.encrypt(np.full(size, 5, np.int64), KEY)
    total = None
    for _ in range(16):
        total = public.add(total, upload, DEFAULT, size)
    assert total is not None
    blob = wire.parse(total, wire.Kind.SUM, DEFAULT, size)
    with seal.memory_file() as file:
        ciphertext = seal.load_full(DEFAULT, file, public.polynomials(blob, DEFAULT)[0])
        decryptor = sealapi.Decryptor(context, secret._secret_key(DEFAULT, KEY, file))
        # The same upload sixteen times: noise adds coherently, to at most 344 of the 2047 allowed: log2 = 2.57 bits.
        assert decryptor.invariant_noise_budget(ciphertext) >= 2


def test_the_aggregators_side_loads_no_secret_code() -> None:
    code = (
        "import sys, services.secure_sum.public, services.secure_sum.disposable;"
        "bad = [m for m in sys.modules if m in ('services.secure_sum.secret', 'tensorflow', 'torch', 'scipy')"
        " or m.startswith('services.privacy')]; sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
