"""Measurements over time, through views that are the same with TimescaleDB and without."""

from collections.abc import Sequence
from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.performance import JOINT, DailyMeasurement, Measurement, Subject

_MAX_DAYS: Final = 5000
# Of a model as of a job the newest are asked for: a model of many years need not read the days of all its jobs.
_MAX_JOBS: Final = 500
_OF_MODEL: Final = (
    "job_id = any(array(select j.job_id from registry.jobs j join registry.plans p using (plan_id)"
    " where p.name = %(model)s order by j.seq desc limit %(jobs)s))"
)

# Of the joint model and of the hospitals of a job.
_OF_COHORT: Final = (
    "array(select %(joint)s union all select unnest(hospital_ids) from registry.jobs where job_id = %(job)s)"
)


class PostgresPerformance:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, measured: Sequence[Measurement]) -> None:
        if not measured:
            return
        await self._connection.execute(
            "insert into registry.performance (hospital_id, job_id, version, name, value, recorded_at)"
            " select * from unnest(%s::text[], %s::uuid[], %s::integer[], %s::text[], %s::double precision[],"
            " %s::timestamptz[])",
            (
                [item.hospital_id for item in measured],
                [item.job_id for item in measured],
                [item.version for item in measured],
                [item.name for item in measured],
                [item.value for item in measured],
                [item.recorded_at for item in measured],
            ),
        )

    async def of_versions(self, subject: Subject, after: int, last: int) -> tuple[tuple[Measurement, ...], int | None]:
        conditions, parameters = _conditions(subject)
        if subject.hospital_id is None:
            # The index begins with the hospital.
            conditions += f" and hospital_id = any({_OF_COHORT})"
        cursor = await self._connection.execute(
            "select hospital_id, job_id, version, name, value, recorded_at,"  # noqa: S608 - constant text
            " (select version from registry.jobs where job_id = %(job)s) as newest from registry.performance"
            f" where {conditions} and version > %(after)s and version <= %(last)s"
            " order by version, hospital_id, name",
            {**parameters, "after": after, "last": last},
        )
        rows = await cursor.fetchall()
        newest = [row.pop("newest") for row in rows]
        return tuple(Measurement(**row) for row in rows), newest[0] if newest else None

    async def by_day(self, subject: Subject, days: int) -> tuple[DailyMeasurement, ...]:
        conditions, parameters = _conditions(subject)
        rows = await self._connection.execute(
            "select * from ("  # noqa: S608 - constant text
            "select hospital_id, name, day, sum(points)::bigint as points, min(lowest) as lowest,"
            " max(highest) as highest, sum(total) / sum(points) as mean from registry.performance_by_day"
            f" where {conditions} and day > (clock_timestamp() at time zone 'UTC')::date - %(days)s"
            " group by day, hospital_id, name order by day desc, hospital_id desc, name desc limit %(limit)s"
            ") newest order by day, hospital_id, name",
            {**parameters, "days": days, "limit": _MAX_DAYS},
        )
        return tuple([DailyMeasurement(**row) async for row in rows])

    async def tend(self) -> tuple[int, int]:
        rows = await self._connection.execute("select made, dropped from registry.tend_measurements()")
        row = await rows.fetchone()
        assert row is not None, "the function gives one row"
        return row["made"], row["dropped"]


def _conditions(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Only conditions that hold: a plan that must also fit those that are not asked for would read everything."""
    conditions = [_OF_MODEL if subject.job_id is None else "job_id = %(job)s"]
    if subject.name is not None:
        conditions.append("name = %(name)s")
    if subject.hospital_id is not None:
        conditions.append("hospital_id = %(hospital)s")
    parameters = {
        "job": subject.job_id,
        "model": subject.model,
        "jobs": _MAX_JOBS,
        "name": subject.name,
        "hospital": subject.hospital_id,
        "joint": JOINT,
    }
    return " and ".join(conditions), parameters
