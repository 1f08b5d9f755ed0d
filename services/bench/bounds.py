"""What this machine can do without fedmesh: the bounds that benchmarks print beside their figures."""

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import numpy as np
import psycopg

_RECORD: Final = bytes(512)
INSERT: Final = "insert into bench.plain (id, body) values (%s, %s)"


def fdatasync_rate(folder: Path, seconds: float) -> float:
    """How often a second this folder's disk makes 512 more bytes of a file durable, one after another."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        number, started = 0, time.monotonic()
        while (passed := time.monotonic() - started) < seconds or not number:
            os.write(file.fileno(), _RECORD)
            os.fdatasync(file.fileno())
            number += 1
    return number / passed


@asynccontextmanager
async def plain_inserts(
    dsn: str, connections: int, body: str, role: str
) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Makes a single-row insert, committed by itself, over the connection of this number.

    dsn: an owner of the database, where a schema `bench` is made, and dropped again. body: text of a row, beside its
    UUID and time. role: may insert too.

    Raises: psycopg.Error.
    """
    async with AsyncExitStack() as stack:
        owner, *opened = [
            await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True))
            for _ in range(connections + 1)
        ]
        # Services' roles may not use the schema `public`.
        name = psycopg.sql.Identifier(role)
        await owner.execute("create schema bench")
        await owner.execute("create table bench.plain (id uuid primary key, body text, at timestamptz default now())")
        await owner.execute(psycopg.sql.SQL("grant usage on schema bench to {}").format(name))
        await owner.execute(psycopg.sql.SQL("grant insert on bench.plain to {}").format(name))

        async def insert(worker: int) -> None:
            await opened[worker].execute(INSERT, (uuid.uuid4(), body))

        try:
            yield insert
        finally:
            await owner.execute("drop schema bench cascade")


async def repeat(work: Callable[[int], Awaitable[None]], workers: int, seconds: float) -> list[float]:
    """Let workers 0, 1, ... do their work again and again, beginning no piece after so many seconds. Returns the
    seconds of every piece: without those that end late, what takes long would count for less.
    """
    latencies: list[float] = []
    ending = time.monotonic() + seconds

    async def go(worker: int) -> None:
        while (started := time.monotonic()) < ending:
            await work(worker)
            latencies.append(time.monotonic() - started)

    async with asyncio.TaskGroup() as group:
        for worker in range(workers):
            group.create_task(go(worker))
    return latencies


def quantiles_ms(latencies: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds, of latencies in seconds; at least one."""
    return {f"p{q}": 1000 * float(np.quantile(latencies, q / 100)) for q in (50, 99)}
