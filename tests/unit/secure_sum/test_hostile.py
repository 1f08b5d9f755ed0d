"""Segments that a peer made up: refused with a reason, and never a crash of the process that serves requests."""

import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import public, seal, secret, uniform, wire
from services.secure_sum.disposable import DisposablePool
from services.secure_sum.encryption import PublicEncryptor
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1, DEFAULT
from services.secure_sum.wire import Layout, layout_of
from tests.support.seal_keys import load_key

Q = DEFAULT.coeff_modulus
LAYOUT = layout_of(DEFAULT.name, 8192, 2)
KEY = secret.generate_group_key()
UPLOAD = next(secret.encrypt_segments(np.arange(8192, dtype=np.int64), KEY, LAYOUT))
ZERO = np.zeros(4096, dtype=np.uint64)
SUM = public.sum_segment(LAYOUT, 0, [UPLOAD], ZERO)
C0_BYTES = wire.packed_size(4096)
SEEDED, WHOLE = (C0_BYTES, uniform.SEED_BYTES), (2 * C0_BYTES, 0)
"""Bytes of coefficients and of seeds in a segment of one ciphertext, without and with a public key."""
PUBLIC_LAYOUT = layout_of(BFV_N4096_Q60_T44_PK_V1.name, 8192, 2)
PUBLIC_UPLOAD = next(PublicEncryptor(secret.make_public_key(KEY)).zeros(PUBLIC_LAYOUT))


@pytest.fixture
async def pool() -> AsyncIterator[DisposablePool]:
    async with DisposablePool(timeout_seconds=20) as made:
        yield made


def check(segments: Sequence[bytes], layout: Layout = LAYOUT) -> bytes:
    """Runs in the child: one byte a segment, 1 when it is accepted, 0 when it is refused as it should be."""
    accepted = bytearray()
    before = bytes(layout.upload_segment_bytes(0))
    for segment in segments:
        try:
            public.check_segment(layout, 0, segment)
            public.sum_segment(layout, 0, [before, segment], ZERO)
            accepted.append(1)
        except FedmeshError as error:
            accepted.append(0 if error.code is Code.CIPHERTEXT_INVALID else 2)
    return bytes(accepted)


def well_formed(segment: bytes, packed: int = C0_BYTES, seeds: int = uniform.SEED_BYTES) -> bool:
    """What the layout says, told without the code under test: Python integers only. packed: bytes of coefficients."""
    if len(segment) != packed + seeds:
        return False
    for start in range(0, packed, 15):
        pair = int.from_bytes(segment[start : start + 15], "little")
        if pair & (2**60 - 1) >= Q or pair >> 60 >= Q:
            return False
    return True


def at(offset: int, new: bytes) -> bytes:
    return UPLOAD[:offset] + new + UPLOAD[offset + len(new) :]


def seal_blob() -> bytes:
    """A real ciphertext in SEAL's own format."""
    with seal.memory_file() as file:
        sealapi.Encryptor(seal.context(DEFAULT), load_key(KEY, file)).encrypt_symmetric(sealapi.Plaintext("1")).save(
            file.path
        )
        return file.read()


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "truncated": (UPLOAD[:-1], "expected 30752"),
    "oversized": (UPLOAD + b"\0", "expected 30752"),
    "twice": (UPLOAD + UPLOAD, "expected 30752"),
    "without a seed": (UPLOAD[:C0_BYTES], "expected 30752"),
    "a sum for an upload": (SUM, "expected 30752"),
    "seal's own bytes": (seal_blob(), "expected 30752"),
    "coefficient = 2^60 - 1": (at(0, b"\xff" * 15), "not below the ciphertext modulus"),
    "even coefficient = q": (at(0, Q.to_bytes(15, "little")), "not below the ciphertext modulus"),
    "odd coefficient = q": (at(15, (Q << 60).to_bytes(15, "little")), "not below the ciphertext modulus"),
    "last coefficient": (at(C0_BYTES - 15, b"\xff" * 15), "not below the ciphertext modulus"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_segment_is_refused_with_its_reason(name: str) -> None:
    segment, reason = CASES[name]
    assert not well_formed(segment)
    calls: list[Callable[[], Any]] = [
        lambda: public.check_segment(LAYOUT, 0, segment),
        lambda: public.add_mask(LAYOUT, 0, segment, ZERO),
        lambda: public.sum_segment(LAYOUT, 0, [UPLOAD, segment], ZERO),
    ]
    for call in calls:
        with pytest.raises(FedmeshError) as caught:
            call()
        assert caught.value.code is Code.CIPHERTEXT_INVALID
        assert reason in caught.value.message
    assert caught.value.detail["position"] == "1"


def test_the_largest_coefficient_is_accepted() -> None:
    public.check_segment(LAYOUT, 0, at(0, (Q - 1 | Q - 1 << 60).to_bytes(15, "little")))


def test_a_wrong_sum_is_refused() -> None:
    # SEAL does not multiply zeros.
    zero_c1 = SUM[:C0_BYTES] + bytes(len(SUM) - C0_BYTES)
    for segments in (
        [zero_c1],
        [UPLOAD],
        [SUM[:-1]],
        [SUM + b"\0"],
        [SUM[:-15] + b"\xff" * 15],
        [],
        [SUM, SUM],
        [b"\xff" * 15],
    ):
        with pytest.raises(FedmeshError) as caught:
            secret.decrypt_segments(segments, KEY, LAYOUT)
        assert caught.value.code is Code.CIPHERTEXT_INVALID


def test_a_segment_of_another_form_is_refused() -> None:
    for size, lanes in ((8188, 2), (8192, 1), (8193, 2), (4096, 2), (4097, 1)):
        with pytest.raises(FedmeshError) as caught:
            public.check_segment(layout_of(DEFAULT.name, size, lanes), 0, UPLOAD)
        assert caught.value.code is Code.CIPHERTEXT_INVALID


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """One corruption: a flipped bit, random bytes, a cut, an insertion, a run of ones, two parts swapped."""
    data = bytearray(blob)
    where = rng.randrange(len(data) - 32)
    kind = rng.randrange(6)
    if kind == 0:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[where : where + 16] = rng.randbytes(16)
    elif kind == 2:
        del data[where : where + rng.randrange(1, 65)]
    elif kind == 3:
        data[where:where] = rng.randbytes(rng.randrange(1, 65))
    elif kind == 4:
        data[where : where + 16] = b"\xff" * 16
    else:
        data[where : where + 16], data[:16] = data[:16], data[where : where + 16]
    return bytes(data)


def structured(rng: random.Random) -> Iterator[bytes]:
    """Segments that somebody made to go wrong: lengths near every boundary, edge coefficients, foreign formats."""
    whole, seal_bytes = len(UPLOAD), seal_blob()
    for length in (0, 1, 14, 15, 16, 63, 64, 65, C0_BYTES - 1, C0_BYTES, C0_BYTES + 63, whole + 1, whole + 15, 1 << 20):
        yield rng.randbytes(length)
        yield bytes(length)
        yield b"\xff" * length
    for value in (Q, Q + 1, 2**60 - 1, 2**60 - 2):
        for odd in (0, 60):
            for pair in [0, 1, 2047, *(rng.randrange(2048) for _ in range(47))]:
                other = rng.randrange(Q)
                yield at(15 * pair, (value << odd | other << (60 - odd)).to_bytes(15, "little"))
    for cut in range(60):
        yield seal_bytes[:cut] + UPLOAD[: rng.randrange(whole)]
        yield (seal_bytes + bytes(whole))[cut : cut + whole - 1]


async def hostile(
    pool: DisposablePool, segments: list[bytes], layout: Layout = LAYOUT, form: tuple[int, int] = SEEDED
) -> tuple[int, int]:
    """Refused and accepted; only well-formed ones may be accepted, and the worker must live through all."""
    before = await pool.run(own_pid)
    accepted = b""
    for start in range(0, len(segments), 50):
        accepted += await pool.run(check, segments[start : start + 50], layout)
    assert list(accepted) == [int(well_formed(segment, *form)) for segment in segments]
    assert await pool.run(own_pid) == before
    return accepted.count(0), accepted.count(1)


def own_pid() -> bytes:
    return str(os.getpid()).encode()


async def test_structured_segments_are_refused(pool: DisposablePool) -> None:
    segments = list(structured(random.Random(7)))
    refused, accepted = await hostile(pool, segments)
    assert len(segments) >= 500
    assert refused == len(segments)
    assert not accepted


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_mutations_never_crash_a_worker_and_only_well_formed_ones_pass(pool: DisposablePool, count: int) -> None:
    rng = random.Random(20240607)
    refused, accepted = await hostile(pool, [mutate(UPLOAD, rng) for _ in range(count)])
    # A flipped bit leaves a segment that is well-formed: what catches it is the hash in the signed statement.
    assert refused > count // 4
    assert accepted > count // 4


@pytest.mark.parametrize("place", [0, C0_BYTES - 15, C0_BYTES, 2 * C0_BYTES - 15], ids=["c0", "c0 end", "c1", "c1 end"])
@pytest.mark.parametrize("pair", [Q, Q << 60, 2**120 - 1], ids=["even", "odd", "both"])
def test_both_polynomials_of_an_upload_under_a_public_key_are_checked(place: int, pair: int) -> None:
    bad = PUBLIC_UPLOAD[:place] + pair.to_bytes(15, "little") + PUBLIC_UPLOAD[place + 15 :]
    for call in (
        lambda: public.check_segment(PUBLIC_LAYOUT, 0, bad),
        lambda: public.add_mask(PUBLIC_LAYOUT, 0, bad, ZERO),
        lambda: public.sum_segment(PUBLIC_LAYOUT, 0, [PUBLIC_UPLOAD, bad], ZERO),
    ):
        with pytest.raises(FedmeshError, match="not below the ciphertext modulus") as caught:
            call()
        assert caught.value.code is Code.CIPHERTEXT_INVALID
    assert caught.value.detail["position"] == "1"


def test_an_upload_of_the_other_set_is_refused() -> None:
    for layout, upload in ((PUBLIC_LAYOUT, UPLOAD), (LAYOUT, PUBLIC_UPLOAD)):
        with pytest.raises(FedmeshError, match="bytes, expected") as caught:
            public.check_segment(layout, 0, upload)
        assert caught.value.code is Code.CIPHERTEXT_INVALID


@pytest.mark.parametrize("count", [100, pytest.param(5_000, marks=pytest.mark.slow)])
async def test_mutations_under_a_public_key_never_crash_a_worker(pool: DisposablePool, count: int) -> None:
    rng = random.Random(20261128)
    segments = [mutate(PUBLIC_UPLOAD, rng) for _ in range(count)]
    refused, accepted = await hostile(pool, segments, PUBLIC_LAYOUT, WHOLE)
    assert refused > count // 4
    assert accepted > count // 4
