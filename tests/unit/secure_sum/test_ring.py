import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tenseal import sealapi

from services.secure_sum import encoding, ring, seal, secret, uniform, wire
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import layout_of
from tests.support.seal_keys import load_key

Q, T = DEFAULT.coeff_modulus, DEFAULT.plain_modulus


def scaled(m: int) -> int:
    """round(q * m / t), half up."""
    return (2 * Q * m + T) // (2 * T)


def edges(most: int, width: int = 2000) -> Coefficients:
    """Every number near 0, `most`, and near every power of two and its complement."""
    near = {e + d for e in (1 << bit for bit in range(64)) for d in (-1, 0, 1)}
    near |= {most - e for e in near} | set(range(width)) | set(range(most - width, most + 1))
    return np.array(sorted(e for e in near if 0 <= e <= most), dtype=np.uint64)


def test_scaling_is_exact_at_the_edges() -> None:
    plain = edges(T - 1)
    # Where the rounding changes: m just before and after gap * m crosses a half of t.
    gap = 2**60 - Q
    turns = [((2 * k + 1) * T) // (2 * gap) + d for k in range(gap) for d in (-1, 0, 1)]
    plain = np.concatenate([plain, np.array([m for m in turns if 0 <= m < T], dtype=np.uint64)])
    result = ring.scale(plain, DEFAULT)
    assert result.tolist() == [scaled(m) for m in plain.tolist()]
    assert int(result.max()) < Q


@given(hnp.arrays(np.uint64, 64, elements=st.integers(0, T - 1)))
@settings(max_examples=300)
def test_scaling_is_exact(plain: Coefficients) -> None:
    assert ring.scale(plain, DEFAULT).tolist() == [scaled(m) for m in plain.tolist()]


def test_nothing_overflows_int64() -> None:
    gap = 2**60 - Q
    assert gap * (T - 1) < 2**63
    assert (T - 1) << 12 < 2**63


@given(hnp.arrays(np.uint64, 64, elements=st.integers(0, 2**64 - 1)))
def test_reduction_is_exact(values: Coefficients) -> None:
    assert ring.reduce(values, DEFAULT).tolist() == [v % Q for v in values.tolist()]


def test_reduction_is_exact_at_the_edges() -> None:
    values = np.concatenate([edges(2**64 - 1), *(edges(k * Q + 1)[-2005:] for k in range(1, 16))])
    assert ring.reduce(values, DEFAULT).tolist() == [v % Q for v in values.tolist()]


def test_as_many_terms_fit_as_a_sum_has() -> None:
    assert ring.lazy_terms(DEFAULT) == DEFAULT.max_contributions == 16
    assert 16 * (Q - 1) < 2**64


@given(st.lists(st.tuples(st.integers(0, Q - 1), st.integers(0, Q - 1)), min_size=1, max_size=64))
def test_subtraction_is_exact(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=np.uint64).T
    assert ring.subtract(a, b, DEFAULT).tolist() == [(x - y) % Q for x, y in pairs]


@pytest.mark.parametrize("method", ["add_plain_inplace", "sub_plain_inplace"])
def test_seal_adds_plaintexts_in_the_same_way(method: str) -> None:
    rng = np.random.default_rng(3)
    plain = rng.integers(0, T, 4096).astype(np.uint64)
    plain[:3] = [T - 1, 0, T // 2]
    polynomials = rng.integers(0, Q, (2, 4096)).astype(np.uint64)
    with seal.memory_file() as file:
        ciphertext = seal.load_ciphertext(DEFAULT, file, polynomials)
        loaded = seal.load_plaintext(DEFAULT, file, plain, sealapi.Plaintext(), ntt=False)
        getattr(sealapi.Evaluator(seal.context(DEFAULT)), method)(ciphertext, loaded)
        result = seal.save_ciphertext(DEFAULT, file, ciphertext)
    scaled_plain = ring.scale(plain, DEFAULT)
    if method == "add_plain_inplace":
        expected = ring.reduce(polynomials[0] + scaled_plain, DEFAULT)
    else:
        expected = ring.subtract(polynomials[0], scaled_plain, DEFAULT)
    assert np.array_equal(result[0], expected)
    assert np.array_equal(result[1], polynomials[1])


def test_seal_adds_ciphertexts_in_the_same_way() -> None:
    a, b = np.random.default_rng(4).integers(0, Q, (2, 2, 4096)).astype(np.uint64)
    with seal.memory_file() as file:
        ciphertext = seal.load_ciphertext(DEFAULT, file, a)
        other = seal.load_ciphertext(DEFAULT, file, b)
        sealapi.Evaluator(seal.context(DEFAULT)).add_inplace(ciphertext, other)
        assert np.array_equal(seal.save_ciphertext(DEFAULT, file, ciphertext), ring.reduce(a + b, DEFAULT))


def unscaled(x: int) -> int:
    """round(t * x / q) mod t, half up."""
    return (2 * T * x + Q) // (2 * Q) % T


def test_rounding_is_exact_at_the_edges() -> None:
    # Where the result changes: x just before and after q * (m + 1/2) / t.
    rng = np.random.default_rng(5)
    near = [0, 1, 2, T - 2, T - 1, *rng.integers(0, T, 3000).tolist()]
    turns = [((2 * m + 1) * Q) // (2 * T) + d for m in near for d in (-1, 0, 1, 2)]
    phase = np.concatenate([edges(Q - 1), np.array([x for x in turns if 0 <= x < Q], dtype=np.uint64)])
    assert ring.unscale(phase, DEFAULT).tolist() == [unscaled(x) for x in phase.tolist()]


@given(hnp.arrays(np.uint64, 64, elements=st.integers(0, Q - 1)))
@settings(max_examples=300)
def test_rounding_is_exact(phase: Coefficients) -> None:
    assert ring.unscale(phase, DEFAULT).tolist() == [unscaled(x) for x in phase.tolist()]


def test_seal_opens_what_is_encrypted_here_and_the_other_way_round() -> None:
    key = secret.generate_group_key()
    form = layout_of(DEFAULT.name, 8192, 2)
    values = np.random.default_rng(6).integers(-1000, 1000, 8192)
    upload = next(secret.encrypt_segments(values, key, form))
    plain = encoding.encode(values, DEFAULT, 2)[0]
    c0, seeds = wire.split_upload(form, 0, upload)
    with seal.memory_file() as file:
        loaded = load_key(key, file)
        decryptor = sealapi.Decryptor(seal.context(DEFAULT), loaded)
        opened = sealapi.Plaintext()
        pair = np.stack((c0, uniform.expand(seeds[0].tobytes(), DEFAULT)))
        decryptor.decrypt(seal.load_ciphertext(DEFAULT, file, pair), opened)
        assert np.array_equal(seal.elements(opened.data, 4096), plain)
        ciphertext = sealapi.Ciphertext()
        text = seal.load_plaintext(DEFAULT, file, plain, sealapi.Plaintext(), ntt=False)
        sealapi.Encryptor(seal.context(DEFAULT), loaded).encrypt_symmetric(text, ciphertext)
        c0, c1 = seal.save_ciphertext(DEFAULT, file, ciphertext)
    assert np.array_equal(secret.decrypt_segments([wire.join(c0, wire.pack(c1))], key, form), values)


def test_the_product_is_that_of_the_ring() -> None:
    """The key itself is its product with 1; polynomials with few terms are multiplied in Python: X^N = -1."""
    rows = [{0: 1}, {0: 5}, {1: 7, 4095: Q - 2}, {2: 1, 4000: 12345}]
    dense = np.zeros((4, 4096), dtype=np.uint64)
    for row, terms in zip(dense, rows, strict=True):
        for power, value in terms.items():
            row[power] = value
    with seal.multiplier(DEFAULT, secret._key_coefficients(DEFAULT, secret.generate_group_key())) as multiply:
        products = [multiply(dense[:count]).tolist() for count in (1, 2, 4)]
    key = products[0][0]
    assert set(key) == {0, 1, Q - 1}
    for product in products:
        for row, terms in zip(product, rows, strict=False):
            expected = [0] * 4096
            for power, value in terms.items():
                for place, of_key in enumerate(key, power):
                    sign = -1 if place >= 4096 else 1
                    expected[place % 4096] = (expected[place % 4096] + sign * value * of_key) % Q
            assert row == expected


def test_errors_are_those_of_seal() -> None:
    errors = secret._errors((64, 4096), DEFAULT).astype(np.int64)
    errors = np.where(errors > Q // 2, errors - Q, errors).reshape(-1)
    assert np.abs(errors).max() <= 21
    # 262,144 draws of variance 10.5: six standard errors either way.
    assert abs(errors.mean()) < 6 * math.sqrt(10.5 / errors.size)
    assert abs(errors.var() - 10.5) < 6 * 10.5 * math.sqrt(2 / errors.size)
    # Each value as often as the binomial distribution says, within six standard errors.
    for value in range(-12, 13):
        chance = math.comb(42, 21 + value) / 2**42
        assert abs((errors == value).sum() - chance * errors.size) < 6 * math.sqrt(chance * errors.size) + 1
    assert not np.array_equal(secret._errors((64, 4096), DEFAULT), secret._errors((64, 4096), DEFAULT))
