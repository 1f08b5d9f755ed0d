"""The log in PostgreSQL. This role may select and insert; there is no statement here that changes a row."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Final, TypeVar
from uuid import UUID

from services.audit.domain.batch import Entry, Extension
from services.audit.ports import Head, Transaction
from services.common.errors import Code, FedmeshError
from services.common.postgres import Connection, Database
from services.transparency.checkpoint import Checkpoint
from services.transparency.merkle import Coordinate

T = TypeVar("T")

# Key of the advisory lock under which the log grows: "audit" in ASCII. Locks are per database.
_LOCK: Final = 0x6175646974

_HASHES: Final = """
    select wanted.level, wanted.position, coalesce(nodes.hash, entries.leaf_hash) as hash
      from unnest(%s::smallint[], %s::bigint[]) as wanted (level, position)
      left join audit.nodes on nodes.level = wanted.level and nodes.position = wanted.position
      left join audit.entries on wanted.level = 0 and entries.index = wanted.position
"""


class PostgresTransaction:
    """Implements `services.audit.ports.Transaction`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock(self) -> None:
        # Under REPEATABLE READ the snapshot would be older than the wait for the lock; each statement after it must
        # see what the lock's last holder committed.
        await self._connection.execute("set transaction isolation level read committed")
        await self._connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))

    async def head(self) -> Head | None:
        cursor = await self._connection.execute(
            "select size, root, note from audit.checkpoints order by size desc limit 1"
        )
        row = await cursor.fetchone()
        return None if row is None else Head(row["size"], row["root"], row["note"])

    async def by_event(self, event_ids: Sequence[UUID]) -> dict[UUID, Entry]:
        rows = await self._connection.execute(
            "select index, event_id, leaf, leaf_hash from audit.entries where event_id = any(%s)", (list(event_ids),)
        )
        return {row["event_id"]: Entry(**row) async for row in rows}

    async def hashes(self, places: Iterable[Coordinate]) -> dict[Coordinate, bytes]:
        wanted = list(places)
        if not wanted:
            return {}
        rows = await self._connection.execute(
            _HASHES, ([place.level for place in wanted], [place.position for place in wanted])
        )
        found = {Coordinate(row["level"], row["position"]): row["hash"] async for row in rows}
        if any(value is None for value in found.values()):
            raise FedmeshError(Code.WRONG_STATE, "a hash of the tree is missing: the database was changed by hand")
        return found

    async def page(self, start: int, stop: int) -> list[tuple[int, bytes]]:
        rows = await self._connection.execute(
            "select index, leaf from audit.entries where index >= %s and index < %s order by index", (start, stop)
        )
        return [(row["index"], row["leaf"]) async for row in rows]

    async def extend(self, extension: Extension, checkpoint: Checkpoint, note: str, at: datetime) -> None:
        cursor = self._connection.cursor()
        async with cursor.copy(
            "copy audit.entries (index, event_id, leaf, leaf_hash, recorded_at) from stdin"
        ) as entries:
            for entry in extension.entries:
                await entries.write_row((entry.index, entry.event_id, entry.leaf, entry.leaf_hash, at))
        async with cursor.copy("copy audit.nodes (level, position, hash) from stdin") as nodes:
            for node in extension.nodes:
                # Level 0 stands in the entries.
                if node.level:
                    await nodes.write_row((node.level, node.position, node.hash))
        await cursor.execute(
            "insert into audit.checkpoints (size, root, note, recorded_at) values (%s, %s, %s, %s)",
            (checkpoint.size, checkpoint.root, note, at),
        )


class PostgresStore:
    """Implements `services.audit.ports.Store`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, name: str, body: Callable[[Transaction], Awaitable[T]]) -> T:
        return await self._database.run_tx(f"audit.{name}", lambda connection: body(PostgresTransaction(connection)))
