"""Hospitals."""

import builtins
from collections.abc import Sequence
from typing import Any, Final

from services.common.postgres import Connection
from services.registry.domain.entities import Hospital, HospitalStatus

# Ordered, so that two transactions that lock several hospitals cannot block each other.
_GET: Final = "select * from registry.hospitals where hospital_id = any(%s::text[]) order by hospital_id"
_GET_LOCKED: Final = _GET + " for update"


class PostgresHospitals:
    def __init__(self, connection: Connection) -> None:
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

    async def set_status(self, hospital_id: str, status: HospitalStatus) -> None:
        await self._connection.execute(
            "update registry.hospitals set status = %s where hospital_id = %s", (status.value, hospital_id)
        )

    async def list(self) -> tuple[Hospital, ...]:
        rows = await self._connection.execute("select * from registry.hospitals order by hospital_id limit 2000")
        found: builtins.list[Hospital] = [_hospital(row) async for row in rows]
        return tuple(found)


def _hospital(row: dict[str, Any]) -> Hospital:
    return Hospital(row["hospital_id"], row["display_name"], HospitalStatus(row["status"]), row["created_at"])
