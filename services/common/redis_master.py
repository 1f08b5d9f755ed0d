"""Leaving a Redis master that is one no more."""

import asyncio
from typing import Final

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection

from services.common.errors import FedmeshError
from services.common.redis import redis_errors
from services.common.tasks import until_cancelled
from services.common.telemetry import get_logger

log = get_logger(__name__)

_INTERVAL_S: Final = 0.5


async def follow_master(client: aioredis.Redis) -> None:
    """Ask the Sentinels who is the master, and hang up on any other server. Runs until cancelled; without Sentinels it
    has nothing to do.

    redis-py asks them when it connects, and only then. Meanwhile commands that wait for a frozen or cut-off master go
    on waiting until their timeout, and a master that comes back is asked as before, and answers: the Sentinels let ten
    seconds pass before they tell it that it is none any more (`SENTINEL_PUBLISH_PERIOD * 4` and the next look).
    """
    pool = client.connection_pool
    if not isinstance(pool, SentinelConnectionPool):
        await until_cancelled()
        return
    while True:
        try:
            async with redis_errors():
                # Closes idle connections to another master by itself.
                await pool.get_master_address()  # type: ignore[no-untyped-call]
                await _leave(pool)
        except (FedmeshError, exceptions.RedisError) as error:
            log.debug("master_not_known", reason=str(error))
        await asyncio.sleep(_INTERVAL_S)


async def _leave(pool: SentinelConnectionPool) -> None:
    used = [item for item in tuple(pool._in_use_connections) if isinstance(item, SentinelManagedConnection)]
    left = [item for item in used if item.is_connected and (item.host, item.port) != pool.master_address]
    # Whoever waits for an answer there is told that the connection is lost, and tries again with the new master.
    await asyncio.gather(*(item.disconnect(nowait=True) for item in left), return_exceptions=True)
    if left:
        log.info("old_master_left", connections=len(left))
