"""What row-level security costs PostgreSQL: reads of the registry with it and without it, in turn."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from uuid import UUID

import psutil
import psycopg
from psycopg.rows import dict_row

from services.common.postgres import Connection, conninfo
from services.embedded.postgres import EmbeddedPostgres
from services.registry.store.rounds import PostgresRounds

# Several times as often as it takes until PostgreSQL settles for a plan.
_WARM: Final = 20
# Seconds of CPU time are told in hundredths: enough reads for two digits.
_READS: Final = 600
_PAGES: Final = 200
_TURNS: Final = 10

_Read = Callable[[PostgresRounds, UUID], Awaitable[Any]]


async def cost_of_row_security(
    postgres: EmbeddedPostgres, hospital: str, jobs: Sequence[UUID], page: int
) -> dict[str, float]:
    """CPU time of PostgreSQL for reads of a hospital, by what is read, as multiples of that for the superuser, whom no
    policy concerns. jobs: of the hospital. page: versions on one.

    Raises: psycopg.Error.
    """
    async with (
        await _connect(conninfo(postgres.config("registry_service"))) as guarded,
        await _connect(postgres.dsn()) as free,
    ):
        await guarded.execute("select registry.enter(%s)", (hospital,))
        reads: dict[str, tuple[int, _Read]] = {
            "a model version": (_READS, lambda rounds, job: rounds.model_version(job, None)),
            f"{page} versions of a job": (_PAGES, lambda rounds, job: rounds.page(job, page, None)),
        }
        return {name: await _multiple(guarded, free, read, jobs, count) for name, (count, read) in reads.items()}


async def _connect(dsn: str) -> Connection:
    return await psycopg.AsyncConnection.connect(dsn, row_factory=dict_row)


async def _multiple(guarded: Connection, free: Connection, read: _Read, jobs: Sequence[UUID], count: int) -> float:
    used = {guarded: 0.0, free: 0.0}
    for connection in used:
        await _repeat(connection, read, jobs, _WARM)
    for _ in range(_TURNS):
        for connection in used:
            before = _cpu_s(connection)
            await _repeat(connection, read, jobs, count // _TURNS)
            used[connection] += _cpu_s(connection) - before
    return used[guarded] / max(used[free], 0.01)


async def _repeat(connection: Connection, read: _Read, jobs: Sequence[UUID], times: int) -> None:
    rounds = PostgresRounds(connection)
    for number in range(times):
        await read(rounds, jobs[number % len(jobs)])


def _cpu_s(connection: Connection) -> float:
    return float(sum(psutil.Process(connection.info.backend_pid).cpu_times()[:2]))
