"""Attestations, check reports, aliases, tags, promotions and roll-backs of model versions."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.promotion import (
    Alias,
    Attestation,
    CheckReport,
    Promotion,
    Rollback,
    Spending,
    Tag,
)

_ALIASES: Final = (
    "select * from"
    " (select distinct on (model, alias) * from registry.alias_moves order by model, alias, seq desc) newest"
)
_GET: Final = "select * from registry.promotions where promotion_id = %s"
_MAX_LISTED: Final = 500
_MAX_METRICS: Final = 20_000
# Contributions to the job's rounds whose attempt is not among the charges that their hospital has reported.
_UNCHARGED: Final = """
    select count(*) as uncharged
    from registry.contributions c join registry.rounds r using (job_id, version)
    where c.job_id = %(job)s and not exists (
        select from registry.ledger_entries l
        where l.kind = 'charged' and l.hospital_id = c.hospital_id and l.job_id = c.job_id::text
        and l.round = r.version and l.attempt = r.attempt
    )
"""
_CHARGED: Final = """
    select hospital_id, count(*) as charged from registry.ledger_entries
    where kind = 'charged' and job_id = %(job)s::text group by hospital_id order by hospital_id
"""
# The outbox keeps every event that the registry ever told the audit log.
_DIFFERING: Final = """
    select distinct m.hospital_id::text as hospital_id
    from registry.job_hospitals m join registry.jobs j using (job_id)
    join registry.outbox o on o.type = 'ledger.differs' and o.subject = 'hospital/' || m.hospital_id
    where m.job_id = %(job)s and o.occurred_at >= j.created_at order by 1
"""


class PostgresPromotions:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    # --- what is known of a version

    async def add_attestation(self, made: Attestation) -> None:
        await self._connection.execute(
            "insert into registry.attestations (job_id, version, envelope, sha256, event_id)"
            " values (%s, %s, %s, %s, %s)",
            (made.job_id, made.version, made.envelope, made.sha256, made.event_id),
        )

    async def attestation(self, job_id: UUID, version: int) -> Attestation | None:
        row = await self._one(
            "select job_id, version, envelope, sha256, event_id from registry.attestations"
            " where job_id = %s and version = %s",
            job_id,
            version,
        )
        if row is None:
            return None
        return Attestation(row["job_id"], row["version"], bytes(row["envelope"]), row["sha256"], row["event_id"])

    async def add_report(self, report: CheckReport, at: datetime) -> None:
        await self._connection.execute(
            "insert into registry.check_reports (hospital_id, job_id, version, statement, signature, reported_at)"
            " values (%s, %s, %s, %s, %s, %s)",
            (report.hospital_id, report.job_id, report.version, report.statement, report.signature, at),
        )

    async def reports(self, job_id: UUID, version: int) -> tuple[CheckReport, ...]:
        rows = await self._connection.execute(
            "select hospital_id, job_id, version, statement, signature from registry.check_reports"
            " where job_id = %s and version = %s order by hospital_id",
            (job_id, version),
        )
        return tuple([CheckReport(**{**row, **_bytes(row, "statement", "signature")}) async for row in rows])

    async def spending(self, job_id: UUID) -> Spending:
        asked = {"job": job_id}
        uncharged = await (await self._connection.execute(_UNCHARGED, asked)).fetchone()
        charged = await self._connection.execute(_CHARGED, asked)
        by_hospital = {row["hospital_id"]: row["charged"] async for row in charged}
        differing = await self._connection.execute(_DIFFERING, asked)
        names = tuple([row["hospital_id"] async for row in differing])
        return Spending(by_hospital, 0 if uncharged is None else uncharged["uncharged"], names)

    async def measurements(self, job_id: UUID) -> dict[int, dict[str, float]]:
        rows = await self._connection.execute(
            "select version, name, value from registry.metrics where job_id = %s order by version limit %s",
            (job_id, _MAX_METRICS),
        )
        found: dict[int, dict[str, float]] = {}
        async for row in rows:
            found.setdefault(row["version"], {})[row["name"]] = row["value"]
        return found

    # --- aliases and tags

    async def move_alias(self, alias: Alias) -> None:
        await self._connection.execute(
            "insert into registry.alias_moves (model, alias, job_id, version, moved_by, moved_at, promotion_id)"
            " values (%s, %s, %s, %s, %s, %s, %s)",
            (
                alias.model,
                alias.alias,
                alias.job_id,
                alias.version,
                alias.moved_by,
                alias.moved_at,
                alias.promotion_id,
            ),
        )

    async def alias(self, model: str, alias: str) -> Alias | None:
        row = await self._one(
            "select * from registry.alias_moves where model = %s and alias = %s order by seq desc limit 1", model, alias
        )
        return None if row is None else _alias(row)

    async def aliases(self, model: str) -> tuple[Alias, ...]:
        rows = await self._connection.execute(
            f"{_ALIASES} where %(model)s = '' or model = %(model)s limit %(limit)s",
            {"model": model, "limit": _MAX_LISTED},
        )
        return tuple([_alias(row) async for row in rows])

    async def aliases_of(self, job_id: UUID, version: int) -> tuple[Alias, ...]:
        rows = await self._connection.execute(f"{_ALIASES} where job_id = %s and version = %s", (job_id, version))
        return tuple([_alias(row) async for row in rows])

    async def set_tag(self, job_id: UUID, version: int, tag: Tag) -> None:
        await self._connection.execute(
            "insert into registry.tag_changes (job_id, version, key, value, set_by, set_at)"
            " values (%s, %s, %s, %s, %s, %s)",
            (job_id, version, tag.key, tag.value, tag.set_by, tag.set_at),
        )

    async def tags(self, job_id: UUID, version: int) -> tuple[Tag, ...]:
        rows = await self._connection.execute(
            "select key, value, set_by, set_at from (select distinct on (key) * from registry.tag_changes"
            " where job_id = %s and version = %s order by key, seq desc) newest where value <> '' limit %s",
            (job_id, version, _MAX_LISTED),
        )
        return tuple([Tag(**row) async for row in rows])

    # --- promotions

    async def add(self, promotion: Promotion) -> None:
        await self._connection.execute(
            "insert into registry.promotions (promotion_id, model, alias, job_id, version, proposed_by, proposed_at,"
            " proposal_verdict) values (%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                promotion.promotion_id,
                promotion.model,
                promotion.alias,
                promotion.job_id,
                promotion.version,
                promotion.proposed_by,
                promotion.proposed_at,
                promotion.proposal_verdict,
            ),
        )

    async def get(self, promotion_id: UUID) -> Promotion | None:
        row = await self._one(_GET, promotion_id)
        return None if row is None else _promotion(row)

    async def approve(self, promotion: Promotion) -> None:
        await self._connection.execute(
            "update registry.promotions set approved_by = %s, approved_at = %s, approval_verdict = %s"
            " where promotion_id = %s",
            (promotion.approved_by, promotion.approved_at, promotion.approval_verdict, promotion.promotion_id),
        )

    async def of_version(self, job_id: UUID, version: int) -> Sequence[Promotion]:
        rows = await self._connection.execute(
            "select * from registry.promotions where job_id = %s and version = %s order by proposed_at desc limit 50",
            (job_id, version),
        )
        return [_promotion(row) async for row in rows]

    # --- roll-backs

    async def add_rollback(self, rollback: Rollback) -> None:
        await self._connection.execute(
            "insert into registry.rollbacks (job_id, diverged_version, good_version, reason, at)"
            " values (%s, %s, %s, %s, %s)",
            (rollback.job_id, rollback.diverged_version, rollback.good_version, rollback.reason, rollback.at),
        )

    async def rollback(self, job_id: UUID) -> Rollback | None:
        row = await self._one("select * from registry.rollbacks where job_id = %s", job_id)
        return None if row is None else Rollback(**row)

    async def _one(self, statement: str, *parameters: object) -> dict[str, Any] | None:
        rows = await self._connection.execute(statement.encode(), parameters)
        return await rows.fetchone()


def _alias(row: dict[str, Any]) -> Alias:
    fields = ("model", "alias", "job_id", "version", "moved_by", "moved_at", "promotion_id")
    return Alias(**{name: row[name] for name in fields})


def _promotion(row: dict[str, Any]) -> Promotion:
    return Promotion(**{**row, **_bytes(row, "proposal_verdict", "approval_verdict")})


def _bytes(row: dict[str, Any], *names: str) -> dict[str, bytes]:
    return {name: bytes(row[name] or b"") for name in names}
