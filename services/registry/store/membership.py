"""Changes of membership."""

import builtins
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.membership import ChangeKind, MembershipChange

_SELECT: Final = (
    "select change_id, kind, hospital_id, reason, token_sha256, valid_s, proposed_by, proposed_at, expires_at,"
    " approved_by, approved_at, approved_at is null and coalesce(h.standing_at > proposed_at, false) as overtaken"
    " from registry.membership_changes join registry.hospitals h using (hospital_id)"
)


class PostgresMembershipChanges:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, change: MembershipChange) -> None:
        await self._connection.execute(
            "insert into registry.membership_changes (change_id, kind, hospital_id, reason, token_sha256, valid_s,"
            " proposed_by, proposed_at, expires_at) values (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                change.change_id,
                change.kind.value,
                change.hospital_id,
                change.reason,
                change.token_sha256,
                None if change.valid is None else int(change.valid.total_seconds()),
                change.proposed_by,
                change.proposed_at,
                change.expires_at,
            ),
        )

    async def get(self, change_id: UUID) -> MembershipChange | None:
        rows = await self._connection.execute(f"{_SELECT} where change_id = %s", (change_id,))
        row = await rows.fetchone()
        return None if row is None else _change(row)

    async def has_token(self, token_sha256: str) -> bool:
        rows = await self._connection.execute(
            "select 1 from registry.membership_changes where token_sha256 = %s", (token_sha256,)
        )
        return await rows.fetchone() is not None

    async def approve(self, change: MembershipChange) -> None:
        await self._connection.execute(
            "update registry.membership_changes set approved_by = %s, approved_at = %s where change_id = %s",
            (change.approved_by, change.approved_at, change.change_id),
        )

    async def list(self) -> tuple[MembershipChange, ...]:
        rows = await self._connection.execute(f"{_SELECT} order by proposed_at desc limit 200")
        found: builtins.list[MembershipChange] = [_change(row) async for row in rows]
        return tuple(found)


def _change(row: dict[str, Any]) -> MembershipChange:
    facts = {key: value for key, value in row.items() if key not in ("kind", "valid_s")}
    valid = None if row["valid_s"] is None else timedelta(seconds=row["valid_s"])
    return MembershipChange(kind=ChangeKind(row["kind"]), valid=valid, **facts)
