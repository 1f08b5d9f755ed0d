"""What a service shows of its Redis, as far as its ACL user may ask."""

from typing import Any

import pytest
import redis.asyncio as aioredis
from prometheus_client import REGISTRY

from services.common.config import RedisConfig
from services.common.redis import connect_redis
from services.common.redis_watch import RedisWatch
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis


def shown(metric: str) -> float:
    value = REGISTRY.get_sample_value(f"fedmesh_redis_{metric}")
    assert value is not None, metric
    return value


async def look(config: RedisConfig) -> None:
    client = connect_redis(config)
    try:
        await RedisWatch(client).look()
    finally:
        await client.aclose()


async def test_redis_says_how_full_it_is_to_a_service(redis_server: RedisServer) -> None:
    await look(redis_server.config("coordinator"))
    assert shown("up") == 1
    assert 1 <= shown("clients") < shown("clients_max")
    assert shown("memory_used_bytes") > 100_000
    assert (shown("replicas"), shown("replica_lag_seconds"), shown("append_only_ok")) == (0, 0, 1)
    assert shown("pool_max") == 64


async def test_a_user_who_may_not_ask_sees_that_it_answers(redis_server: RedisServer) -> None:
    with redis_server.client() as admin:
        admin.execute_command("ACL SETUSER coordinator -info")
        try:
            await look(redis_server.config("coordinator"))
        finally:
            admin.execute_command("ACL SETUSER coordinator +info")
    assert shown("up") == 1


async def test_a_redis_that_is_away_is_shown_as_such() -> None:
    await look(RedisConfig(url="redis://127.0.0.1:1/0", username="coordinator"))
    assert shown("up") == 0


class Closing(aioredis.Redis):
    """One whose connections close while they are written to: uvloop's words, which redis-py lets through."""

    async def ping(self, **_: Any) -> Any:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_connection_that_closes_ends_no_service() -> None:
    await RedisWatch(Closing()).look()
    assert shown("up") == 0
