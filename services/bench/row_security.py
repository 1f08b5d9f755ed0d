"""What row-level security costs PostgreSQL: the same reads of the registry with it and without it, in turn."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from psycopg.rows import dict_row

from services.common.postgres import AnsweringConnection, Question, Statement, conninfo
from services.embedded.postgres import EmbeddedPostgres
from services.registry.store.postgres import enter
from services.registry.store.rounds import PostgresRounds

SAME: Final = "row-level security"
ALL: Final = "row-level security and the question whose member asks"
# Several times as often as it takes until PostgreSQL settles for a plan.
_WARM: Final = 20
_READS: Final = 1500
_PAGES: Final = 450
_TURNS: Final = 30

_Read = Callable[[PostgresRounds, UUID], Awaitable[Any]]
_Way = tuple[AnsweringConnection, Sequence[Statement]]
"""Who asks, and what opens the transaction."""


async def cost_of_row_security(
    postgres: EmbeddedPostgres, hospital: str, jobs: Sequence[UUID], page: int
) -> dict[str, dict[str, float]]:
    """CPU time of PostgreSQL for reads of a hospital, by what is read, as multiples of that for the superuser, whom no
    policy concerns. Both ask as the registry does: BEGIN, the statement that enters, the read, COMMIT in one round
    trip, all prepared before. SAME: against the superuser who enters too, so that only the policies differ. ALL:
    against one who does not. jobs: of the hospital. page: versions on one.

    Raises: psycopg.Error.
    """
    entering = (enter(hospital),)
    async with (
        await _connect(conninfo(postgres.config("registry_service"))) as guarded,
        await _connect(postgres.dsn()) as free,
    ):
        ways: tuple[_Way, ...] = ((guarded, entering), (free, entering), (free, ()))
        reads: dict[str, tuple[int, _Read]] = {
            "a model version": (_READS, lambda rounds, job: rounds.model_version(job, None)),
            f"{page} versions of a job": (_PAGES, lambda rounds, job: rounds.page(job, page, None)),
        }
        return {name: await _multiples(ways, read, jobs, count) for name, (count, read) in reads.items()}


async def _connect(dsn: str) -> AnsweringConnection:
    return await AnsweringConnection.connect(dsn, autocommit=True, row_factory=dict_row)


async def _multiples(ways: Sequence[_Way], read: _Read, jobs: Sequence[UUID], count: int) -> dict[str, float]:
    used = [0.0] * len(ways)
    for way in ways:
        await _repeat(way, read, jobs, _WARM)
    for _ in range(_TURNS):
        for number, way in enumerate(ways):
            before = _cpu_s(way[0])
            await _repeat(way, read, jobs, count // _TURNS)
            used[number] += _cpu_s(way[0]) - before
    guarded, entering, plain = used
    return {SAME: guarded / entering, ALL: guarded / plain}


async def _repeat(way: _Way, read: _Read, jobs: Sequence[UUID], times: int) -> None:
    for number in range(times):
        await read(PostgresRounds(Question(*way)), jobs[number % len(jobs)])


def _cpu_s(connection: AnsweringConnection) -> float:
    """CPU time of the backend so far. In nanoseconds, not in hundredths of a second as elsewhere: a turn takes few."""
    told = Path(f"/proc/{connection.info.backend_pid}/schedstat").read_text(encoding="ascii")
    return int(told.split()[0]) / 1e9
