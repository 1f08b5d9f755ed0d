"""The entries of hospitals' privacy ledgers, as they reported them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from services.common.postgres import Statements
from services.privacy.chain import Entry, Head
from services.registry.domain.entities import LedgerReport, ReportedLedger

# A contribution whose attempt is not among the charges that its hospital has reported.
_HEADS: Final = """
    select h.hospital_id, e.seq, e.sha256, e.signature, e.reported_at,
        (
            select count(*)
            from registry.contributions c
            join registry.rounds r using (job_id, version)
            join registry.jobs j using (job_id)
            join registry.plans p using (plan_id)
            where c.hospital_id = h.hospital_id and p.private and not exists (
                select from registry.ledger_entries l
                where l.kind = 'charged' and l.hospital_id = c.hospital_id and l.job_id = c.job_id::text
                and l.round = r.version and l.attempt = r.attempt
            )
        ) as uncharged
    from registry.hospitals h
    left join lateral (
        select * from registry.ledger_entries l where l.hospital_id = h.hospital_id order by l.seq desc limit 1
    ) e on true
    where %(hospital)s::text = '' or h.hospital_id = %(hospital)s
    order by h.hospital_id
"""


class PostgresLedgers:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def newest(self, hospital_id: str) -> tuple[Head, bytes]:
        rows = await self._connection.execute(
            "select seq, sha256, signature from registry.ledger_entries where hospital_id = %s"
            " order by seq desc limit 1",
            (hospital_id,),
        )
        row = await rows.fetchone()
        return (Head(), b"") if row is None else (Head(row["seq"], row["sha256"]), bytes(row["signature"]))

    async def sha256s(self, hospital_id: str, first: int, last: int) -> dict[int, str]:
        rows = await self._connection.execute(
            "select seq, sha256 from registry.ledger_entries where hospital_id = %s and seq between %s and %s",
            (hospital_id, first, last),
        )
        return {row["seq"]: row["sha256"] async for row in rows}

    async def add(self, report: LedgerReport, at: datetime) -> None:
        for entry in report.entries:
            said = entry.read()
            await self._connection.execute(
                "insert into registry.ledger_entries (hospital_id, seq, kind, job_id, round, attempt, body, sha256,"
                " signature, reported_at) values (%s, %s, %s, %s, %s, %s, %b, %s, %b, %s)",
                (
                    report.hospital_id,
                    entry.seq,
                    said["kind"],
                    said.get("job_id", ""),
                    said.get("round"),
                    said.get("attempt"),
                    entry.body,
                    entry.sha256,
                    report.signature if entry.head == report.head else None,
                    at,
                ),
            )

    async def heads(self, hospital_id: str) -> tuple[ReportedLedger, ...]:
        rows = await self._connection.execute(_HEADS, {"hospital": hospital_id})
        return tuple([_ledger(row) async for row in rows])

    async def after(self, hospital_id: str, seq: int, size: int) -> Sequence[Entry]:
        rows = await self._connection.execute(
            "select seq, body, sha256 from registry.ledger_entries where hospital_id = %s and seq > %s"
            " order by seq limit %s",
            (hospital_id, seq, size),
        )
        return [Entry(row["seq"], bytes(row["body"]), row["sha256"]) async for row in rows]

    async def newer(self, known: Mapping[str, int], size: int) -> Sequence[tuple[str, Entry]]:
        rows = await self._connection.execute(
            "select l.hospital_id, l.seq, l.body, l.sha256 from registry.ledger_entries l"
            " left join unnest(%s::text[], %s::bigint[]) as known (hospital_id, seq) using (hospital_id)"
            " where l.seq > coalesce(known.seq, 0) order by l.hospital_id, l.seq limit %s",
            (list(known), list(known.values()), size),
        )
        return [(row["hospital_id"], Entry(row["seq"], bytes(row["body"]), row["sha256"])) async for row in rows]


def _ledger(row: dict[str, Any]) -> ReportedLedger:
    head = Head(row["seq"] or 0, row["sha256"] or "")
    signature = bytes(row["signature"] or b"")
    return ReportedLedger(row["hospital_id"], head, signature, row["reported_at"], row["uncharged"])
