"""Plans."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.entities import Page, Plan, PlanStatus

_GET: Final = "select * from registry.plans where plan_id = %s"
_GET_LOCKED: Final = _GET + " for update"


class PostgresPlans:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, plan: Plan) -> bool:
        result = await self._connection.execute(
            "insert into registry.plans (plan_id, name, rounds, private, status, proposed_by, approved_by, created_at,"
            " manifest, parameter_set) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
            (
                plan.plan_id,
                plan.name,
                plan.rounds,
                plan.private,
                plan.status.value,
                plan.proposed_by,
                plan.approved_by,
                plan.created_at,
                plan.manifest,
                plan.parameter_set,
            ),
        )
        return result.rowcount == 1

    async def get(self, plan_id: str, *, lock: bool = False) -> Plan | None:
        rows = await self._connection.execute(_GET_LOCKED if lock else _GET, (plan_id,))
        row = await rows.fetchone()
        return None if row is None else _plan(row)

    async def approve(self, plan_id: str, approved_by: str) -> None:
        await self._connection.execute(
            "update registry.plans set status = 'approved', approved_by = %s where plan_id = %s", (approved_by, plan_id)
        )

    async def first_of(self, parameter_sets: Sequence[str]) -> datetime | None:
        rows = await self._connection.execute(
            "select min(created_at) as first from registry.plans where status = 'approved' and parameter_set = any(%s)",
            (list(parameter_sets),),
        )
        row = await rows.fetchone()
        return None if row is None else row["first"]

    async def page(self, size: int, before: int | None) -> Page[Plan]:
        rows = await self._connection.execute(
            "select seq, plan_id, name, rounds, private, status, proposed_by, approved_by, created_at, parameter_set,"
            " ''::bytea as manifest from registry.plans"
            " where %(before)s::bigint is null or seq < %(before)s order by seq desc limit %(limit)s",
            {"before": before, "limit": size + 1},
        )
        found = await rows.fetchall()
        more = len(found) > size
        return Page(tuple(_plan(row) for row in found[:size]), found[size - 1]["seq"] if more else None)


def _plan(row: dict[str, Any]) -> Plan:
    return Plan(
        plan_id=row["plan_id"],
        name=row["name"],
        manifest=bytes(row["manifest"]),
        rounds=row["rounds"],
        private=row["private"],
        status=PlanStatus(row["status"]),
        proposed_by=row["proposed_by"],
        approved_by=row["approved_by"],
        created_at=row["created_at"],
        parameter_set=row["parameter_set"],
    )
