"""Bytes that a peer made up: rejected with a reason, and never a crash of this process."""

import asyncio
import ctypes
import dataclasses
import os
import random
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from tenseal import sealapi

from services.common.errors import Code, FedmeshError
from services.secure_sum import public, seal, secret, wire
from services.secure_sum.disposable import DisposablePool
from services.secure_sum.parameters import DEFAULT

SIZE = 8192
KEY = secret.generate_group_key()
UPLOAD = secret.encrypt(np.arange(SIZE, dtype=np.int64), KEY)
SUM = public.add(None, UPLOAD, DEFAULT, SIZE)


@pytest.fixture
async def pool() -> AsyncIterator[DisposablePool]:
    async with DisposablePool(timeout_seconds=20) as made:
        yield made


def at(offset: int, new: bytes) -> bytes:
    return UPLOAD[:offset] + new + UPLOAD[offset + len(new) :]


def seal_blob() -> bytes:
    """A real ciphertext in SEAL's own format."""
    with seal.memory_file() as file:
        key = secret._secret_key(DEFAULT, KEY, file)
        sealapi.Encryptor(seal.context(DEFAULT), key).encrypt_symmetric(sealapi.Plaintext("1")).save(file.path)
        return file.read()


def rejection(check: Callable[[], object]) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        check()
    return caught.value


CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "less than a header"),
    "header only": (UPLOAD[:64], "length in bytes"),
    "truncated": (UPLOAD[:-1], "length in bytes"),
    "oversized": (UPLOAD + b"\0", "length in bytes"),
    "twice": (UPLOAD + UPLOAD, "length in bytes"),
    "a sum for an upload": (SUM, "not an upload"),
    "seal's own bytes": (seal_blob(), "magic"),
    "layout": (at(4, struct.pack("<H", 2)), "layout version 2"),
    "lanes": (at(6, b"\1"), "lanes is 1"),
    "reserved": (at(7, b"\1"), "reserved"),
    "other set": (at(8, b"bfv-n8192-q60-t48-v1".ljust(32, b"\0")), "under parameter set 'bfv-n8192-q60-t48-v1'"),
    "name tail": (at(39, b"x"), "parameter set"),
    "vector length": (at(40, struct.pack("<Q", SIZE - 1)), "vector length"),
    "huge vector": (at(40, struct.pack("<Q", 2**64 - 1)), "vector length"),
    "count": (at(48, struct.pack("<I", 2)), "ciphertext count"),
    "c0": (at(52, struct.pack("<I", 4094)), "c0 coefficients"),
    "no contributions": (at(56, struct.pack("<I", 0)), "contributions"),
    "two contributions": (at(56, struct.pack("<I", 2)), "contributions"),
    "end": (at(60, b"\1"), "reserved"),
    "coefficient = 2^60 - 1": (at(64, b"\xff" * 15), "not below the ciphertext modulus"),
    "coefficient = q": (at(64, (DEFAULT.coeff_modulus).to_bytes(15, "little")), "not below the ciphertext modulus"),
    "last coefficient": (at(64 + 30720 - 15, b"\xff" * 15), "not below the ciphertext modulus"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_upload_is_rejected_with_its_reason(name: str) -> None:
    blob, reason = CASES[name]
    for error in (
        rejection(lambda: public.validate_upload(blob, DEFAULT, SIZE)),
        rejection(lambda: public.add(None, blob, DEFAULT, SIZE)),
    ):
        assert error.code is Code.CIPHERTEXT_INVALID
        assert reason in error.message


def test_the_largest_coefficient_is_accepted() -> None:
    public.validate_upload(at(64, (DEFAULT.coeff_modulus - 1).to_bytes(8, "little")), DEFAULT, SIZE)


def test_a_wrong_sum_is_rejected() -> None:
    for blob in (UPLOAD, SUM[:-1], SUM + b"\0", SUM[:56] + struct.pack("<I", 17) + SUM[60:], SUM[:-15] + b"\xff" * 15):
        with pytest.raises(FedmeshError) as caught:
            secret.decrypt(blob, KEY, SIZE)
        assert caught.value.code is Code.CIPHERTEXT_INVALID
        with pytest.raises(FedmeshError):
            public.add(blob, UPLOAD, DEFAULT, SIZE)


def test_an_upload_for_another_job_is_rejected() -> None:
    for size, lanes in ((SIZE - 1, 2), (SIZE, 1), (SIZE + 1, 2)):
        with pytest.raises(FedmeshError):
            public.validate_upload(UPLOAD, DEFAULT, size, lanes)
    with pytest.raises(FedmeshError, match="this sum uses 'bfv-test'"):
        public.validate_upload(UPLOAD, dataclasses.replace(DEFAULT, name="bfv-test"), SIZE)


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """One corruption: a flipped bit, random bytes, a cut, an insertion, a swap of parts; half of them in the header."""
    data = bytearray(blob)
    where = rng.randrange(64) if rng.random() < 0.5 else rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[where : where + 16] = rng.randbytes(min(16, len(data) - where))
    elif kind == 2:
        del data[where : where + rng.randrange(1, 65)]
    elif kind == 3:
        data[where:where] = rng.randbytes(rng.randrange(1, 65))
    else:
        data[where : where + 8] = b"\xff" * min(8, len(data) - where)
    return bytes(data)


async def test_two_thousand_mutations_never_crash_a_worker(pool: DisposablePool) -> None:
    rng = random.Random(20240607)
    refusals: list[FedmeshError] = []
    accepted = 0
    for i in range(2000):
        upload, accumulator = (mutate(UPLOAD, rng), SUM) if i % 2 else (UPLOAD, mutate(SUM, rng))
        mutated, original = (upload, UPLOAD) if i % 2 else (accumulator, SUM)
        try:
            total = await pool.run(public.add, accumulator, upload, DEFAULT, SIZE)
        except FedmeshError as error:
            refusals.append(error)
        else:
            # Only what lies behind the header can change unnoticed here: the signed hash of the upload covers that.
            assert len(mutated) == len(original)
            header = bytearray(mutated[:64])
            header[56] = original[56]  # contributions of a sum, 1 to 16
            assert bytes(header) == original[:64]
            assert len(total) == wire.sum_size(DEFAULT, SIZE)
            accepted += 1
    assert {error.code for error in refusals} <= {Code.CIPHERTEXT_INVALID, Code.INVALID_ARGUMENT}
    assert not [error for error in refusals if "signal" in error.detail]
    assert len(refusals) > 1200
    assert accepted > 100


def segfault() -> bytes:
    return bytes(ctypes.string_at(0))


def abort() -> bytes:
    os.abort()


def killed() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def hang() -> bytes:
    time.sleep(3600)
    return b""


def hang_noting_pid(path: str) -> bytes:
    Path(path).write_text(str(os.getpid()))
    return hang()


def refuse() -> bytes:
    raise FedmeshError(Code.WRONG_STATE, "no", why="because")


def fail() -> bytes:
    raise ZeroDivisionError("secret detail")


def own_pid() -> bytes:
    return str(os.getpid()).encode()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def noted(note: Path) -> str:
    return note.read_text() if note.exists() else ""


async def written(note: Path) -> None:
    """Wait for the file of another process."""
    while not noted(note):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_work_runs_elsewhere_and_the_worker_is_kept(pool: DisposablePool) -> None:
    first, second = int(await pool.run(own_pid)), int(await pool.run(own_pid))
    assert first == second != os.getpid()
    total = await pool.run(public.add, None, UPLOAD, DEFAULT, SIZE)
    assert total == SUM


@pytest.mark.parametrize(("crash", "name"), [(segfault, "SIGSEGV"), (abort, "SIGABRT")])
async def test_a_crash_rejects_the_upload_and_the_pool_lives_on(
    pool: DisposablePool, crash: Callable[[], bytes], name: str
) -> None:
    before = int(await pool.run(own_pid))
    with pytest.raises(FedmeshError) as caught:
        await pool.run(crash)
    assert caught.value.code is Code.CIPHERTEXT_INVALID
    assert caught.value.detail["signal"] == name
    after = int(await pool.run(own_pid))
    assert after != before
    assert gone(before)


async def test_a_killed_worker_is_not_the_senders_fault(pool: DisposablePool) -> None:
    with pytest.raises(FedmeshError) as caught:
        await pool.run(killed)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE
    assert await pool.run(own_pid)


async def test_a_hang_ends_at_the_limit(pool: DisposablePool) -> None:
    before = int(await pool.run(own_pid))
    with pytest.raises(FedmeshError) as caught:
        await pool.run(hang, timeout_seconds=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert gone(before)
    assert int(await pool.run(own_pid)) != before


async def test_a_cancelled_call_kills_its_worker(pool: DisposablePool, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    call = asyncio.create_task(pool.run(hang_noting_pid, str(note)))
    await written(note)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert int(await pool.run(own_pid)) != int(noted(note))
    assert gone(int(noted(note)))


async def test_errors_cross_the_pipe(pool: DisposablePool) -> None:
    with pytest.raises(FedmeshError) as refused:
        await pool.run(refuse)
    assert (refused.value.code, refused.value.message, refused.value.detail) == (
        Code.WRONG_STATE,
        "no",
        {"why": "because"},
    )
    with pytest.raises(FedmeshError) as failed:
        await pool.run(fail)
    assert failed.value.code is Code.INTERNAL
    assert "secret detail" not in str(failed.value)


async def test_closing_ends_calls_in_flight_and_leaves_no_process(tmp_path: Path) -> None:
    pool = DisposablePool(workers=1)
    note = tmp_path / "pid"
    call = asyncio.create_task(pool.run(hang_noting_pid, str(note)))
    await written(note)
    await pool.close()
    with pytest.raises(FedmeshError) as caught:
        await call
    assert caught.value.code is Code.SERVICE_UNAVAILABLE
    assert gone(int(noted(note)))
    with pytest.raises(FedmeshError):
        await pool.run(own_pid)
    await pool.close()


async def test_two_workers_run_at_once() -> None:
    async with DisposablePool(workers=2) as pool:
        first, second = await asyncio.gather(pool.run(slow_pid), pool.run(slow_pid))
        assert first != second


def slow_pid() -> bytes:
    time.sleep(0.2)
    return own_pid()
