"""Jobs and their attempts."""

from datetime import datetime
from typing import Any
from uuid import UUID

from services.common.postgres import Connection
from services.registry.domain.entities import Job, JobStatus, Page

_SELECT = (
    "select j.seq, j.job_id, j.plan_id, p.name as plan_name, p.private, j.hospital_ids, j.status, j.reason, p.rounds,"
    " j.version, coalesce(r.state_sha256, '') as state_sha256, j.created_at, j.ended_at"
    " from registry.jobs j join registry.plans p using (plan_id)"
    " left join registry.rounds r on r.job_id = j.job_id and r.version = j.version"
)


class PostgresJobs:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, job: Job) -> None:
        await self._connection.execute(
            "insert into registry.jobs (job_id, plan_id, hospital_ids, status, reason, version, created_at)"
            " values (%s, %s, %s, %s, %s, %s, %s)",
            (
                job.job_id,
                job.plan_id,
                list(job.hospital_ids),
                job.status.value,
                job.reason,
                job.version,
                job.created_at,
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

    async def newest_attempt(self, job_id: UUID, round_number: int) -> int:
        rows = await self._connection.execute(
            "select coalesce(max(attempt), 0) as newest from registry.attempts where job_id = %s and round = %s",
            (job_id, round_number),
        )
        row = await rows.fetchone()
        return 0 if row is None else int(row["newest"])

    async def add_attempt(self, job_id: UUID, round_number: int, attempt: int, reason: str, at: datetime) -> None:
        await self._connection.execute(
            "insert into registry.attempts (job_id, round, attempt, reason, opened_at) values (%s, %s, %s, %s, %s)",
            (job_id, round_number, attempt, reason, at),
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
    )
