"""Jobs and their attempts."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.entities import Job, JobStatus, OpenedAttempt, Page

_SELECT = (
    "select j.seq, j.job_id, j.plan_id, p.name as plan_name, p.private, j.hospital_ids, j.status, j.reason, p.rounds,"
    " j.version, coalesce(r.state_sha256, '') as state_sha256, j.created_at, j.ended_at,"
    " coalesce(j.roster_sha256, '') as roster_sha256, coalesce(cardinality(m.members), 0) as roster_size"
    " from registry.jobs j join registry.plans p using (plan_id)"
    " left join registry.rounds r on r.job_id = j.job_id and r.version = j.version"
    " left join registry.rosters m on m.sha256 = j.roster_sha256"
)


class PostgresJobs:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, job: Job) -> None:
        await self._connection.execute(
            "insert into registry.jobs (job_id, plan_id, hospital_ids, status, reason, version, created_at,"
            " roster_sha256) values (%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                job.job_id,
                job.plan_id,
                list(job.hospital_ids),
                job.status.value,
                job.reason,
                job.version,
                job.created_at,
                job.roster_sha256,
            ),
        )
        await self._connection.execute(
            "insert into registry.job_hospitals (hospital_id, job_id) select unnest(%s::text[]), %s",
            (list(job.hospital_ids), job.job_id),
        )

    async def get(self, job_id: UUID, *, lock: bool = False) -> Job | None:
        rows = await self._connection.execute(
            f"{_SELECT} where j.job_id = %s" + (" for update of j" if lock else ""), (job_id,)
        )
        row = await rows.fetchone()
        return None if row is None else _job(row)

    async def touch(self, job_id: UUID) -> None:
        await self._connection.execute("update registry.jobs set version = version where job_id = %s", (job_id,))

    async def end(self, job_id: UUID, status: JobStatus, reason: str, at: datetime) -> None:
        await self._connection.execute(
            "update registry.jobs set status = %s, reason = %s, ended_at = %s where job_id = %s",
            (status.value, reason, at, job_id),
        )

    async def page(self, status: JobStatus | None, size: int, before: int | None) -> Page[Job]:
        rows = await self._connection.execute(
            f"{_SELECT} where (%(status)s::text is null or j.status = %(status)s)"
            " and (%(before)s::bigint is null or j.seq < %(before)s) order by j.seq desc limit %(limit)s",
            {"status": status and status.value, "before": before, "limit": size + 1},
        )
        found = await rows.fetchall()
        more = len(found) > size
        return Page(tuple(_job(row) for row in found[:size]), found[size - 1]["seq"] if more else None)

    async def running_with(self, hospital_ids: Sequence[str]) -> tuple[Job, ...]:
        rows = await self._connection.execute(
            f"{_SELECT} where j.status = 'running' and (j.hospital_ids && %(names)s::text[] or j.roster_sha256 in"  # noqa: S608 - a constant
            " (select sha256 from registry.rosters where members && %(names)s::text[]))"
            " order by j.job_id for update of j",
            {"names": list(hospital_ids)},
        )
        return tuple([_job(row) async for row in rows])

    async def newest_attempt(self, job_id: UUID, round_number: int) -> tuple[int, int | None]:
        rows = await self._connection.execute(
            "select attempt, epoch from registry.attempts where job_id = %s and round = %s"
            " order by attempt desc limit 1",
            (job_id, round_number),
        )
        row = await rows.fetchone()
        return (0, None) if row is None else (row["attempt"], row["epoch"])

    async def add_attempt(self, opened: OpenedAttempt, reason: str, at: datetime) -> None:
        await self._connection.execute(
            "insert into registry.attempts (job_id, round, attempt, epoch, reason, opened_at)"
            " values (%s, %s, %s, %s, %s, %s)",
            (opened.job_id, opened.round, opened.attempt, opened.epoch, reason, at),
        )


def _job(row: dict[str, Any]) -> Job:
    return Job(
        job_id=row["job_id"],
        plan_id=row["plan_id"],
        plan_name=row["plan_name"],
        private=row["private"],
        hospital_ids=tuple(row["hospital_ids"]),
        status=JobStatus(row["status"]),
        reason=row["reason"],
        rounds=row["rounds"],
        version=row["version"],
        state_sha256=row["state_sha256"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
        roster_sha256=row["roster_sha256"],
        roster_size=row["roster_size"],
    )
