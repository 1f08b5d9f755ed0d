"""How replicas share a job, on a real Redis: one drives, the others wait without working."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest
import redis.asyncio as aioredis

from services.common.redis import connect_redis
from services.common.tasks import end_tasks
from services.coordinator.outward import Registry
from services.coordinator.runner import JobRunner
from services.coordinator.store.redis import RedisRounds
from services.coordinator.tenure import Parts, Settings
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis

JOB = "11111111-2222-4333-8444-555555555555"


class Counting(RedisRounds):
    """Notes how often a lease was asked for."""

    def __init__(self, client: aioredis.Redis, *, lease_ms: int) -> None:
        super().__init__(client, lease_ms=lease_ms)
        self.asked = 0
        self.look = asyncio.Semaphore(0)

    async def acquire(self, job_id: str) -> str | None:
        self.asked += 1
        self.look.release()
        return await super().acquire(job_id)


class Nothing:
    """A registry that only tells that it was asked, which is what a runner does as soon as it has the lease."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def job(self, _job_id: str) -> None:
        self.asked.set()
        await asyncio.Event().wait()


@pytest.fixture
async def stores(redis_server: RedisServer) -> AsyncIterator[tuple[RedisRounds, Counting]]:
    client = connect_redis(redis_server.config("coordinator"))
    yield RedisRounds(client, lease_ms=60_000), Counting(client, lease_ms=60_000)
    await client.aclose()


def runner(store: RedisRounds, registry: Nothing, lease_s: float) -> JobRunner:
    settings = Settings("spiffe://test.local/service/coordinator", lease_s, 3.0, 2.0, 5)
    unused: Any = None
    return JobRunner(JOB, Parts(store, cast(Registry, registry), unused, unused, unused, settings, unused))


async def test_a_replica_without_the_lease_asks_for_it_now_and_then(stores: tuple[RedisRounds, Counting]) -> None:
    """A report wakes it once. It must not ask without end from then on."""
    other, store = stores
    assert await other.acquire(JOB)
    waiting = runner(store, Nothing(), lease_s=0.6)
    task = asyncio.create_task(waiting.run())
    await store.look.acquire()
    waiting.wake()
    await store.look.acquire()
    await asyncio.sleep(1.0)
    await end_tasks([task])
    assert store.asked <= 2 + 6  # five looks a second, and what was under way


async def test_a_lease_that_is_given_up_is_taken_at_once(stores: tuple[RedisRounds, Counting]) -> None:
    other, store = stores
    owner = await other.acquire(JOB)
    assert owner is not None
    registry = Nothing()
    waiting = runner(store, registry, lease_s=3600)

    async def listen() -> None:
        async with aclosing(store.wake_ups()) as wake_ups:
            async for _ in wake_ups:
                waiting.wake()

    tasks = [asyncio.create_task(listen()), asyncio.create_task(waiting.run())]
    await store.look.acquire()
    await asyncio.sleep(0.1)
    async with asyncio.timeout(30):
        while owner is not None:
            await other.release(JOB, owner)
            await asyncio.sleep(0.1)  # the first may be given up before the other one listens
            owner = await other.acquire(JOB)
        await registry.asked.wait()
    await end_tasks(tasks)
