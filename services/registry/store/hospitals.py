"""Hospitals."""

import builtins
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.entities import Hospital, HospitalStatus, Strike

# Ordered, so that two transactions that lock several hospitals cannot block each other.
_GET: Final = "select * from registry.hospitals where hospital_id = any(%s::text[]) order by hospital_id"
_GET_LOCKED: Final = _GET + " for update"
_STRIKING: Final = (
    "select h.*, (select count(*) from registry.strikes s where s.hospital_id = h.hospital_id and s.at > %s"
    " and (h.strikes_from is null or s.at > h.strikes_from)) as strikes,"
    " (select c.not_after from registry.certificates c where c.hospital_id = h.hospital_id"
    "   order by c.not_before desc limit 1) as certificate_not_after from registry.hospitals h"
)


class PostgresHospitals:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, hospital: Hospital) -> bool:
        result = await self._connection.execute(
            "insert into registry.hospitals (hospital_id, display_name, status, created_at)"
            " values (%s, %s, %s, %s) on conflict do nothing",
            (hospital.hospital_id, hospital.display_name, hospital.status.value, hospital.created_at),
        )
        return result.rowcount == 1

    async def get(self, hospital_ids: Sequence[str], *, lock: bool = False) -> dict[str, Hospital]:
        rows = await self._connection.execute(_GET_LOCKED if lock else _GET, (list(hospital_ids),))
        return {row["hospital_id"]: _hospital(row) async for row in rows}

    async def touch(self, hospital_ids: Sequence[str]) -> None:
        await self._connection.execute(
            "update registry.hospitals set status = status where hospital_id = any(%s::text[])", (list(hospital_ids),)
        )

    async def set_status(self, hospital_id: str, status: HospitalStatus, at: datetime) -> None:
        await self._connection.execute(
            # A suspension anew is a decision of its own: what was proposed before it was proposed without it.
            "update registry.hospitals set status = %(status)s, standing_at ="
            " case when status = %(status)s and status <> 'suspended' then standing_at else %(at)s end"
            " where hospital_id = %(hospital)s",
            {"status": status.value, "at": at, "hospital": hospital_id},
        )

    async def forgive(self, hospital_id: str, at: datetime) -> None:
        await self._connection.execute(
            "update registry.hospitals set strikes_from = %s where hospital_id = %s", (at, hospital_id)
        )

    async def add_strike(self, strike: Strike) -> None:
        await self._connection.execute(
            "insert into registry.strikes (hospital_id, request_id, code, reason, job_id, round, attempt, reported_by,"
            " at) values (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                strike.hospital_id,
                strike.request_id,
                strike.code,
                strike.reason,
                *(strike.attempt or (None, None, None)),
                strike.reported_by,
                strike.at,
            ),
        )

    async def strikes(self, hospital_id: str, since: datetime) -> int:
        rows = await self._connection.execute(f"{_STRIKING} where h.hospital_id = %s", (since, hospital_id))
        row = await rows.fetchone()
        return 0 if row is None else int(row["strikes"])

    async def list(self, strikes_since: datetime) -> tuple[Hospital, ...]:
        rows = await self._connection.execute(f"{_STRIKING} order by h.hospital_id limit 2000", (strikes_since,))
        found: builtins.list[Hospital] = [_hospital(row) async for row in rows]
        return tuple(found)


def _hospital(row: dict[str, Any]) -> Hospital:
    return Hospital(
        row["hospital_id"],
        row["display_name"],
        HospitalStatus(row["status"]),
        row["created_at"],
        row.get("strikes", 0),
        row["certificates_from"],
        row.get("certificate_not_after"),
        row["standing_at"],
    )
