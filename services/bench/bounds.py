"""What this machine can do without fedmesh: the bounds that benchmarks print beside their figures."""

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import psycopg

_RECORD: Final = bytes(512)


def fdatasync_rate(folder: Path, seconds: float) -> float:
    """How often a second this folder's disk makes 512 more bytes of a file durable, one after another."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        number, started = 0, time.monotonic()
        while (passed := time.monotonic() - started) < seconds or not number:
            os.write(file.fileno(), _RECORD)
            os.fdatasync(file.fileno())
            number += 1
    return number / passed


async def plain_insert_rate(dsn: str, connections: int, seconds: float, body: str) -> float:
    """Single-row inserts a second, each committed by itself, over so many connections.

    dsn: a role that may create a table; it is dropped again. body: text of a row, beside its UUID and time.

    Raises: psycopg.Error.
    """
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as owner:
        await owner.execute("create table public.plain (id uuid primary key, body text, at timestamptz default now())")
        opened = [await psycopg.AsyncConnection.connect(dsn, autocommit=True) for _ in range(connections)]
        try:

            async def insert(worker: int) -> None:
                await opened[worker].execute("insert into public.plain values (%s, %s)", (uuid.uuid4(), body))

            latencies = await repeat(insert, connections, seconds)
        finally:
            for connection in opened:
                await connection.close()
            await owner.execute("drop table public.plain")
    return len(latencies) / seconds


async def repeat(work: Callable[[int], Awaitable[None]], workers: int, seconds: float) -> list[float]:
    """Let workers 0, 1, ... do their work again and again. Returns the seconds of each piece that ended in time."""
    latencies: list[float] = []
    ending = time.monotonic() + seconds

    async def go(worker: int) -> None:
        while (started := time.monotonic()) < ending:
            await work(worker)
            if (ended := time.monotonic()) <= ending:
                latencies.append(ended - started)

    async with asyncio.TaskGroup() as group:
        for worker in range(workers):
            group.create_task(go(worker))
    return latencies


def quantiles_ms(latencies: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds, of latencies in seconds; at least one."""
    return {f"p{q}": 1000 * float(np.quantile(latencies, q / 100)) for q in (50, 99)}
