"""Events on their way to the audit log."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.entities import Event


class PostgresOutbox:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, events: Sequence[Event]) -> None:
        columns = zip(
            *(
                (item.event_id, item.type, item.occurred_at, item.actor, item.subject, item.body_json)
                for item in events
            ),
            strict=True,
        )
        await self._connection.execute(
            "insert into registry.outbox (event_id, type, occurred_at, actor, subject, body_json)"
            " select * from unnest(%s::uuid[], %s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[])"
            " on conflict do nothing",
            [list(column) for column in columns],
        )

    async def claim(self, limit: int, seconds: float) -> tuple[Event, ...]:
        rows = await self._connection.execute(
            "with oldest as (select seq from registry.outbox where log_index is null and refusal is null"
            "   and (claimed_until is null or claimed_until < clock_timestamp())"
            "   order by seq limit %s for update skip locked),"
            " claimed as (update registry.outbox o set claimed_until = clock_timestamp() + make_interval(secs => %s)"
            "   from oldest where o.seq = oldest.seq returning o.*)"
            " select * from claimed order by seq",
            (limit, seconds),
        )
        return tuple([_event(row) async for row in rows])

    async def placed(self, indices: dict[UUID, int]) -> None:
        await self._connection.execute(
            "update registry.outbox o set log_index = given.index, claimed_until = null"
            " from unnest(%s::uuid[], %s::bigint[]) as given (id, index) where o.event_id = given.id",
            (list(indices), list(indices.values())),
        )

    async def release(self, event_ids: Sequence[UUID]) -> None:
        await self._connection.execute(
            "update registry.outbox set claimed_until = null where event_id = any(%s) and log_index is null",
            (list(event_ids),),
        )

    async def index(self, event_id: UUID) -> int | None:
        rows = await self._connection.execute("select log_index from registry.outbox where event_id = %s", (event_id,))
        row = await rows.fetchone()
        return None if row is None else row["log_index"]

    async def refused(self, event_id: UUID, reason: str) -> None:
        await self._connection.execute(
            "update registry.outbox set refusal = %s, claimed_until = null where event_id = %s and log_index is null",
            (reason, event_id),
        )

    async def backlog(self) -> tuple[int, float, int]:
        rows = await self._connection.execute(
            "select (select count(*) from registry.outbox where log_index is null and refusal is null) as waiting,"
            " (select extract(epoch from clock_timestamp() - recorded_at) from registry.outbox"
            "   where log_index is null and refusal is null order by seq limit 1)::double precision as age,"
            " (select count(*) from registry.outbox where refusal is not null) as refused"
        )
        row = await rows.fetchone()
        return (0, 0.0, 0) if row is None else (row["waiting"], max(0.0, row["age"] or 0.0), row["refused"])


def _event(row: dict[str, Any]) -> Event:
    return Event(row["event_id"], row["type"], row["occurred_at"], row["actor"], row["subject"], row["body_json"])
