import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tenseal import sealapi

from services.secure_sum import ring, seal, secret
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import DEFAULT

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
        ciphertext = seal.load_full(DEFAULT, file, polynomials)
        loaded = seal.load_plaintext(DEFAULT, file, plain, sealapi.Plaintext(), ntt=False)
        getattr(sealapi.Evaluator(seal.context(DEFAULT)), method)(ciphertext, loaded)
        result = seal.save_full(DEFAULT, file, ciphertext)
    scaled_plain = ring.scale(plain, DEFAULT)
    if method == "add_plain_inplace":
        expected = ring.reduce(polynomials[0] + scaled_plain, DEFAULT)
    else:
        expected = ring.subtract(polynomials[0], scaled_plain, DEFAULT)
    assert np.array_equal(result[0], expected)
    assert np.array_equal(result[1], polynomials[1])


def test_seal_encrypts_zero_and_adds_the_plaintext() -> None:
    """What `secret.encrypt_segments` relies on: c0 of zero plus the scaled plaintext decrypts to the plaintext."""
    key = secret.generate_group_key()
    plain = np.arange(4096, dtype=np.uint64) * np.uint64(68_719_476_701) % np.uint64(T)
    with seal.memory_file() as file:
        loaded = secret._secret_key(DEFAULT, key, file)
        ciphertext = sealapi.Ciphertext()
        sealapi.Encryptor(seal.context(DEFAULT), loaded).encrypt_zero_symmetric(ciphertext)
        polynomials = seal.save_full(DEFAULT, file, ciphertext).copy()
        polynomials[0] = ring.reduce(polynomials[0] + ring.scale(plain, DEFAULT), DEFAULT)
        result = sealapi.Plaintext()
        decryptor = sealapi.Decryptor(seal.context(DEFAULT), loaded)
        decryptor.decrypt(seal.load_full(DEFAULT, file, polynomials), result)
        assert np.array_equal(seal.save_plaintext(DEFAULT, file, result), plain)
        assert np.array_equal(seal.elements(result.data, 4096), plain)
