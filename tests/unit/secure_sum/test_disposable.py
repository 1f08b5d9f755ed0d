"""Work on bytes that a peer made up may crash or hang its process, and nothing else."""

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum.disposable import DisposablePool


@pytest.fixture
async def pool() -> AsyncIterator[DisposablePool]:
    async with DisposablePool(timeout_seconds=20) as made:
        yield made


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


def joined(separator: bytes, parts: Iterator[bytes]) -> bytes:
    return separator.join(parts)


def first_of(parts: Iterator[bytes]) -> bytes:
    return next(parts)


def total(parts: Iterator[bytes]) -> bytes:
    return str(sum(map(len, parts))).encode()


def refuse_second(parts: Iterator[bytes]) -> bytes:
    first_of(parts)
    next(parts)
    return refuse()


def ask_for_ever(parts: Iterator[bytes]) -> bytes:
    # What a child that was taken over may do.
    reduced: Any = parts.__reduce__()
    while True:
        reduced[1][0]()


async def given(part: bytes) -> bytes:
    await asyncio.sleep(0)
    return part


async def test_parts_are_given_when_they_are_asked_for(pool: DisposablePool) -> None:
    texts = [b"a", b"b" * 100_000, b"c"]
    assert await pool.run(joined, b"-", parts=map(given, texts)) == b"-".join(texts)
    assert await pool.run(joined, b"-", parts=map(given, [])) == b""
    # Whoever wants no more is given no more, and what is left over disturbs nobody.
    for function in (first_of, refuse_second):
        left = iter(texts)
        with suppress(FedmeshError):
            assert await pool.run(function, parts=map(given, left)) == b"a"
        assert next(left) == (b"c" if function is refuse_second else texts[1])
    assert await pool.run(own_pid)


async def test_a_part_that_fails_or_is_empty_ends_the_call_and_its_worker(pool: DisposablePool) -> None:
    async def lost() -> bytes:
        raise FedmeshError(Code.NOT_FOUND, "gone")

    before = int(await pool.run(own_pid))
    with pytest.raises(FedmeshError) as caught:
        await pool.run(total, parts=iter([given(b"x"), lost()]))
    assert caught.value.code is Code.NOT_FOUND
    assert gone(before)
    with pytest.raises(ValueError, match="empty"):
        await pool.run(total, parts=map(given, [b"x", b"", b"y"]))
    assert await pool.run(total, parts=map(given, [b"x", b"yz"])) == b"3"


async def test_a_worker_that_asks_for_more_than_there_is_is_ended(pool: DisposablePool) -> None:
    before = int(await pool.run(own_pid))
    with pytest.raises(FedmeshError) as caught:
        await pool.run(ask_for_ever, parts=map(given, [b"x"]))
    assert caught.value.code is Code.INTERNAL
    assert gone(before)


async def test_a_cancelled_call_that_waits_for_a_part_kills_its_worker(pool: DisposablePool) -> None:
    before = int(await pool.run(own_pid))
    waiting, never = asyncio.Event(), asyncio.Event()

    async def part() -> bytes:
        waiting.set()
        await never.wait()
        return b"x"

    call = asyncio.create_task(pool.run(total, parts=iter([part()])))
    await waiting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert gone(before)
    assert await pool.run(own_pid)


async def test_a_worker_that_hangs_over_a_part_ends_at_the_limit(pool: DisposablePool) -> None:
    with pytest.raises(FedmeshError) as caught:
        await pool.run(hang_over, parts=map(given, [b"x" * 1_000_000]), timeout_seconds=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def hang_over(parts: Iterator[bytes]) -> bytes:
    next(parts)
    return hang()


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
