"""Writers that do nothing else: `python -m loadtests.chaos.probe --config FILE`. How long is each store not writable?

A row every 0.1 s into PostgreSQL, by whatever node takes writes, and a key every 0.1 s into Redis, by the Sentinels'
master. `postgres.jsonl` and `redis.jsonl` hold the time and number of each that was acknowledged.
"""

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psycopg
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from loadtests.chaos.records import Appender
from services.common.postgres import AnsweringConnection
from services.common.postgres_servers import Servers

EVERY_S: Final = 0.1
# What one try may take before another connection is tried.
TRY_S: Final = 1.0
CREATE: Final = "create schema if not exists chaos; create table if not exists chaos.probe (number bigint primary key)"


async def _connect(conninfo: str) -> AnsweringConnection:
    # Seconds to reach one node; libpq knows no fewer.
    return await AnsweringConnection.connect(conninfo, autocommit=True, connect_timeout=2)


class PostgresProbe:
    """One connection at a time, thrown away after any error."""

    def __init__(self, conninfo: str) -> None:
        self._servers = Servers(conninfo, _connect)
        self._connection: AnsweringConnection | None = None

    async def write(self, number: int) -> None:
        if self._connection is None or self._connection.closed:
            self._connection = await self._servers.connect()
            self._connection.answer_s = TRY_S
        try:
            await self._connection.execute("insert into chaos.probe values (%s) on conflict do nothing", [number])
        except psycopg.Error:
            await self._connection.close()
            raise


class RedisProbe:
    def __init__(self, config: dict[str, Any]) -> None:
        account: dict[str, Any] = {"username": config["username"], "password": config["password"]}
        limits: dict[str, Any] = {
            "socket_timeout": TRY_S,
            "socket_connect_timeout": TRY_S,
            "retry": Retry(NoBackoff(), 0),
        }
        watchers = Sentinel(  # type: ignore[no-untyped-call]
            [tuple(item) for item in config["sentinels"]], sentinel_kwargs={**account, **limits, "protocol": 2}
        )
        self._client: aioredis.Redis = watchers.master_for(config["master"], **account, **limits, protocol=2)

    async def write(self, number: int) -> None:
        await self._client.set("chaos:probe", number)


async def _probe(write: Callable[[int], Awaitable[None]], log: Appender, stop: asyncio.Event) -> None:
    number = 0
    while not stop.is_set():
        began = time.monotonic()
        number += 1
        with suppress(psycopg.Error, RedisError, OSError, TimeoutError):
            await write(number)
            log.add(time.time(), number)
        await asyncio.sleep(max(0.0, began + EVERY_S - time.monotonic()))


async def run(config: dict[str, Any]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    truth = Path(config["truth"])
    probes = {"postgres": PostgresProbe(config["conninfo"]).write, "redis": RedisProbe(config["redis"]).write}
    await asyncio.gather(*(_probe(write, Appender(truth / f"{name}.jsonl"), stop) for name, write in probes.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    asyncio.run(run(json.loads(parser.parse_args().config.read_text())))
