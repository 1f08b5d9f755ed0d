"""What a batch does when one of its uploads crashes or hangs the worker."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from services.aggregator import combiner
from services.aggregator.addition import add_batch
from services.aggregator.combiner import Combiner
from services.aggregator.domain.sums import AttemptId, Form
from services.aggregator.store.redis import RedisSums
from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.common.redis import connect_redis
from services.secure_sum import secret
from services.secure_sum.disposable import DisposablePool
from services.secure_sum.parameters import DEFAULT
from tests.support.stores import RedisServer

FORM = Form(DEFAULT.name, 2, 100)
CRASH = b"crash"


def add_or_crash(accumulator: bytes | None, uploads: list[bytes], *form: str | int) -> bytes:
    """`add_batch` with a parser bug: one of the uploads ends the process."""
    if CRASH in uploads:
        os.kill(os.getpid(), signal.SIGSEGV)
    return add_batch(accumulator, uploads, *form)  # type: ignore[arg-type]


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisSums]:
    client = connect_redis(redis_server.config("aggregator"))
    yield RedisSums(client)
    await client.aclose()


async def test_an_upload_that_crashes_the_worker_costs_only_itself(
    store: RedisSums, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combiner, "add_batch", add_or_crash)
    key = secret.generate_group_key()
    values = np.arange(100, dtype=np.int64)
    attempt = AttemptId(new_id(), 1, 1)
    await store.open(attempt, FORM, ["h1", "h2", "h3"], datetime.now(UTC) + timedelta(minutes=1))
    async with DisposablePool(1, preload=("services.aggregator.addition",)) as pool:
        adding = Combiner(store, pool, batch=16)
        answers = await asyncio.gather(
            adding.add(attempt, "h1", "1", secret.encrypt(values, key)),
            adding.add(attempt, "h2", "2", CRASH),
            adding.add(attempt, "h3", "3", secret.encrypt(values, key)),
            return_exceptions=True,
        )
    assert isinstance(answers[1], FedmeshError)
    assert answers[1].code is Code.CIPHERTEXT_INVALID
    held = await store.get(attempt)
    assert held is not None
    assert held.blob is not None
    assert set(held.contributions) == {"h1", "h3"}
    total = await store.read_blob(held.blob)
    assert total is not None
    assert np.array_equal(secret.decrypt(total, key, 100), 2 * values)


async def test_one_hospital_is_never_added_twice_in_a_batch(store: RedisSums) -> None:
    key = secret.generate_group_key()
    one, two = (secret.encrypt(np.full(100, value, dtype=np.int64), key) for value in (1, 2))
    attempt = AttemptId(new_id(), 1, 1)
    await store.open(attempt, FORM, ["h1", "h2"], datetime.now(UTC) + timedelta(minutes=1))
    async with DisposablePool(1, preload=("services.aggregator.addition",)) as pool:
        adding = Combiner(store, pool, batch=16)
        same, again, other = await asyncio.gather(
            adding.add(attempt, "h1", "1", one),
            adding.add(attempt, "h1", "1", one),
            adding.add(attempt, "h1", "2", two),
            return_exceptions=True,
        )
    assert (same, again) == ((1, False), (1, True))
    assert isinstance(other, FedmeshError)
    assert other.code is Code.ALREADY_CONTRIBUTED


async def test_a_sum_that_is_over_takes_nothing(store: RedisSums) -> None:
    async with DisposablePool(1) as pool:
        with pytest.raises(FedmeshError) as caught:
            await Combiner(store, pool, batch=16).add(AttemptId(new_id(), 1, 1), "h1", "1", b"")
    assert caught.value.code is Code.NOT_FOUND
