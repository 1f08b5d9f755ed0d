"""Committed rounds, model versions and metrics."""

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.entities import CommittedRound, Contribution, Metric, ModelVersion, Page, Round

_MAX_METRICS: Final = 5000
_ROUND: Final = (
    "r.job_id, r.version, r.seq, r.attempt, r.sum_sha256, r.state_sha256, r.contributions_root, r.agreeing,"
    " r.dissenting, r.attesting, r.finalizer, r.metrics_json, r.upload_bytes, r.sealed_at, r.committed_at,"
    " r.content_sha256, r.burnt, r.burnt_reason, r.survivors_sha256, r.event_id, r.contributed"
)
_ROUNDS: Final = f"select {_ROUND} from registry.rounds r"  # noqa: S608 - constant text
_MODEL: Final = (
    f"select {_ROUND}, j.plan_id, p.name as plan_name, p.private,"  # noqa: S608 - constant text
    " coalesce(r.state_bytes, 0) as size_bytes, j.status = 'completed' and j.version = r.version as final"
    " from registry.rounds r join registry.jobs j using (job_id) join registry.plans p using (plan_id)"
)


class PostgresRounds:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, committed: CommittedRound, metrics: Mapping[str, float]) -> None:
        told = committed.round
        await self._connection.execute(
            "insert into registry.rounds (job_id, version, attempt, sum_sha256, state_sha256, contributions_root,"
            " agreeing, dissenting, attesting, finalizer, metrics_json, upload_bytes, sealed_at, committed_at,"
            " content_sha256, burnt, burnt_reason, survivors_sha256, event_id)"
            " values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                told.job_id,
                told.version,
                told.attempt,
                told.sum_sha256 or None,
                told.state_sha256 or None,
                committed.contributions_root,
                list(told.agreeing),
                list(told.dissenting),
                list(told.attesting),
                told.finalizer or None,
                told.metrics_json,
                told.upload_bytes,
                told.sealed_at,
                committed.committed_at,
                told.content_sha256,
                told.burnt,
                told.burnt_reason,
                told.survivors_sha256,
                committed.event_id,
            ),
        )
        await self._add_parts(committed, metrics)
        await self._connection.execute(
            "update registry.jobs set version = %s where job_id = %s", (told.version, told.job_id)
        )

    async def _add_parts(self, committed: CommittedRound, metrics: Mapping[str, float]) -> None:
        told = committed.round
        await self._connection.execute(
            "insert into registry.contributions (hospital_id, job_id, version, ciphertext_sha256, age)"
            " select h, %s, %s, d, a from unnest(%s::text[], %s::text[], %s::integer[]) as given (h, d, a)",
            (
                told.job_id,
                told.version,
                [item.hospital_id for item in told.contributions],
                [item.ciphertext_sha256 for item in told.contributions],
                [item.age for item in told.contributions],
            ),
        )
        if metrics:
            await self._connection.execute(
                "insert into registry.metrics (job_id, version, name, value, recorded_at)"
                " select %s, %s, n, v, %s from unnest(%s::text[], %s::double precision[]) as given (n, v)",
                (told.job_id, told.version, committed.committed_at, list(metrics), list(metrics.values())),
            )

    async def content_sha256(self, job_id: UUID, version: int) -> bytes | None:
        rows = await self._connection.execute(
            "select content_sha256 from registry.rounds where job_id = %s and version = %s", (job_id, version)
        )
        row = await rows.fetchone()
        return None if row is None else bytes(row["content_sha256"])

    async def after(self, job_id: UUID, version: int, size: int) -> tuple[CommittedRound, ...]:
        rows = await self._connection.execute(
            f"{_ROUNDS} where r.job_id = %s and r.version > %s order by r.version limit %s",
            (job_id, version, size),
        )
        return tuple([_committed(row) async for row in rows])

    async def model_version(self, job_id: UUID, version: int | None) -> ModelVersion | None:
        # Only a newest version that there is: a job without one is at version 0.
        which = "j.version" if version is None else "%(version)s"
        rows = await self._connection.execute(
            f"{_MODEL} where r.job_id = %(job)s and r.version = {which}", {"job": job_id, "version": version}
        )
        row = await rows.fetchone()
        return None if row is None else _model_version(row)

    async def page(self, job_id: UUID | None, size: int, before: int | None) -> Page[tuple[int, ModelVersion]]:
        # Only the conditions that hold: a plan that must also fit "no job" would walk the versions of all jobs.
        conditions = ["true"]
        if job_id is not None:
            conditions.append("r.job_id = %(job)s")
        if before is not None:
            conditions.append("r.seq < %(before)s")
        rows = await self._connection.execute(
            f"{_MODEL} where {' and '.join(conditions)} order by r.seq desc limit %(limit)s",
            {"job": job_id, "before": before, "limit": size + 1},
        )
        found = await rows.fetchall()
        more = len(found) > size
        return Page(
            tuple((row["seq"], _model_version(row)) for row in found[:size]), found[size - 1]["seq"] if more else None
        )

    async def metrics(self, job_id: UUID, name: str | None) -> tuple[Metric, ...]:
        rows = await self._connection.execute(
            "select * from (select job_id, version, name, value, recorded_at from registry.metrics"
            " where job_id = %(job)s and (%(name)s::text is null or name = %(name)s)"
            " order by recorded_at desc, name desc limit %(limit)s) newest order by recorded_at, name",
            {"job": job_id, "name": name, "limit": _MAX_METRICS},
        )
        return tuple(
            [Metric(row["job_id"], row["version"], row["name"], row["value"], row["recorded_at"]) async for row in rows]
        )


def _committed(row: dict[str, Any]) -> CommittedRound:
    told = Round(
        job_id=row["job_id"],
        version=row["version"],
        attempt=row["attempt"],
        contributions=tuple(
            Contribution(hospital, digest, int(age)) for hospital, digest, age in row["contributed"] or ()
        ),
        sum_sha256=row["sum_sha256"] or "",
        agreeing=tuple(row["agreeing"]),
        dissenting=tuple(row["dissenting"]),
        finalizer=row["finalizer"] or "",
        attesting=tuple(row["attesting"]),
        state_sha256=row["state_sha256"] or "",
        metrics_json=row["metrics_json"],
        upload_bytes=row["upload_bytes"],
        sealed_at=row["sealed_at"],
        content_sha256=bytes(row["content_sha256"]),
        survivors_sha256=row["survivors_sha256"] or "",
        burnt=row["burnt"],
        burnt_reason=row["burnt_reason"],
    )
    return CommittedRound(told, row["contributions_root"], row["committed_at"], row["event_id"])


def _model_version(row: dict[str, Any]) -> ModelVersion:
    return ModelVersion(
        plan_id=row["plan_id"],
        plan_name=row["plan_name"],
        private=row["private"],
        final=row["final"],
        size_bytes=row["size_bytes"],
        committed=_committed(row),
    )
