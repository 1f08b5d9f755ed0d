"""The log in PostgreSQL. This role may select and insert; there is no statement here that changes a row."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from psycopg import AsyncCursor, IsolationLevel
from psycopg.rows import DictRow

from services.audit.domain.batch import Entry, Extension
from services.audit.domain.witnesses import Alarm, AlarmKind, Cosigned
from services.audit.ports import Archived, Beginning, CosignedHead, Head, StoredPart, Transaction, require_online
from services.common.errors import Code, FedmeshError
from services.common.postgres import Connection, Database
from services.transparency.checkpoint import Checkpoint
from services.transparency.merkle import Coordinate, leaf_hash

T = TypeVar("T")

# Key of the advisory lock under which the log grows: "audit" in ASCII. Locks are per database.
_LOCK: Final = 0x6175646974

_HEAD: Final = "select size, root, note from audit.checkpoints order by size desc limit 1"

_HASHES: Final = """
    select wanted.level, wanted.position, coalesce(nodes.hash, entries.leaf_hash) as hash
      from unnest(%b::smallint[], %b::bigint[]) as wanted (level, position)
      left join audit.nodes on nodes.level = wanted.level and nodes.position = wanted.position
      left join audit.entries on wanted.level = 0 and entries.index = wanted.position
"""

# Of an entry in an archive there is the hash of its leaf, among the nodes.
_KNOWN: Final = """
    select events.index, events.event_id, coalesce(entries.leaf_hash, nodes.hash) as leaf_hash
      from audit.events
      left join audit.entries on entries.index = events.index
      left join audit.nodes on nodes.level = 0 and nodes.position = events.index
     where events.event_id = any(%b)
"""

# Half a partition before the last one is full.
_ROOM: Final = """
    select stop_index - (stop_index - first_index) / 2 as room
      from audit.partitions order by first_index desc limit 1
"""

_ARCHIVED: Final = """
    select a.first_index as first, p.stop_index as stop, p.level, a.root, a.manifest, a.detached_by, a.event_id,
           a.recorded_at, e.event_id is not null as told
      from audit.archives a join audit.partitions p using (first_index) left join audit.events e using (event_id)
     order by a.first_index
"""

# By the time of their last entry. 45 CFR 164.316(b)(2)(i): six years.
_FULL_PARTS: Final = """
    select p.first_index as first, p.level, e.recorded_at as newest,
           e.recorded_at <= clock_timestamp() - make_interval(months => %s) as aged,
           e.recorded_at + interval '6 years' as keep_until
      from audit.partitions p join audit.entries e on e.index = p.stop_index - 1
     order by p.first_index
"""

# Of the newest checkpoint's tree, as `merkle.frontier_nodes` has it: for every one-bit of its size a subtree.
_EDGE: Final = """
    select level.level, (head.size >> level.level) - 1 as position, coalesce(nodes.hash, entries.leaf_hash) as hash
      from (select size from audit.checkpoints order by size desc limit 1) as head
     cross join generate_series(0, 62) as level (level)
      left join audit.nodes on nodes.level = level.level and nodes.position = (head.size >> level.level) - 1
      left join audit.entries on level.level = 0 and entries.index = head.size - 1
     where (head.size >> level.level) & 1 = 1
"""

# One statement, so that others wait for the lock no longer than one round trip. PostgreSQL runs what a WITH inserts,
# whether or not anybody reads it. Arrays go in binary (%b): as text each byte of a hash is escaped twice, in Python.
_EXTEND: Final = """
    with events as (
        insert into audit.events (event_id, index)
        select * from unnest(%(events)b::uuid[], %(indices)b::bigint[])
    ), entries as (
        insert into audit.entries (index, leaf, leaf_hash, recorded_at)
        select new.*, %(at)s
          from unnest(%(indices)b::bigint[], %(leaves)b::bytea[], %(leaf_hashes)b::bytea[]) as new
    ), nodes as (
        insert into audit.nodes (level, position, hash)
        select * from unnest(%(levels)b::smallint[], %(positions)b::bigint[], %(hashes)b::bytea[])
    )
    insert into audit.checkpoints (size, root, note, recorded_at) values (%(size)s, %(root)s, %(note)s, %(at)s)
"""

_COSIGNED: Final = """
    select c.size, c.note, c.recorded_at, s.hospital_id, s.public_key, s.line, s.cosigned_at
      from (select distinct size from audit.cosignatures where size < %s order by size desc limit %s) as newest
      join audit.checkpoints c using (size) join audit.cosignatures s using (size)
     order by c.size desc, s.hospital_id
"""


class PostgresTransaction:
    """Implements `services.audit.ports.Transaction`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def begin_append(self, event_ids: Sequence[UUID]) -> Beginning:
        # One round trip.
        async with self._connection.pipeline():
            await self._connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
            newest = await self._connection.execute(_HEAD)
            edge = await self._connection.execute(_EDGE)
            known = await self._connection.execute(_KNOWN, (list(event_ids),))
            room = await self._connection.execute(_ROOM)
        last = await room.fetchone()
        return Beginning(
            _head(await newest.fetchone()),
            await _by_place(edge),
            {row["event_id"]: Entry(**row) async for row in known},
            0 if last is None else last["room"],
        )

    async def head(self) -> Head | None:
        cursor = await self._connection.execute(_HEAD)
        return _head(await cursor.fetchone())

    async def leaf(self, index: int) -> bytes:
        leaf = await self._leaf(index)
        if leaf is None:
            require_online(index, await self.archived())
            raise _missing(index)
        return leaf

    async def leaf_hash(self, index: int) -> bytes:
        leaf = await self._leaf(index)
        if leaf is not None:
            return leaf_hash(leaf)
        cursor = await self._connection.execute(
            "select hash from audit.nodes where level = 0 and position = %s", (index,)
        )
        row = await cursor.fetchone()
        if row is None:
            raise _missing(index)
        return bytes(row["hash"])

    async def _leaf(self, index: int) -> bytes | None:
        cursor = await self._connection.execute("select leaf from audit.entries where index = %s", (index,))
        row = await cursor.fetchone()
        return None if row is None else bytes(row["leaf"])

    async def archived(self) -> list[Archived]:
        return [Archived(**row) async for row in await self._connection.execute(_ARCHIVED)]

    async def full_parts(self, months: int) -> list[StoredPart]:
        return [StoredPart(**row) async for row in await self._connection.execute(_FULL_PARTS, (months,))]

    async def make_room(self, size: int) -> None:
        await self._connection.execute("select audit.make_partitions(%s)", (size,))

    async def offered(self, period_s: float) -> Head | None:
        # Walks back from the newest: over the checkpoints of one period at most.
        cursor = await self._connection.execute(
            "select size, root, note from audit.checkpoints where recorded_at <="
            " to_timestamp(floor(extract(epoch from clock_timestamp()) / %(period)s) * %(period)s)"
            " order by size desc limit 1",
            {"period": period_s},
        )
        if row := await cursor.fetchone():
            return _head(row)
        cursor = await self._connection.execute("select size, root, note from audit.checkpoints order by size limit 1")
        return _head(await cursor.fetchone())

    async def checkpoint(self, size: int) -> Head | None:
        cursor = await self._connection.execute(
            "select size, root, note from audit.checkpoints where size = %s", (size,)
        )
        return _head(await cursor.fetchone())

    async def hashes(self, places: Iterable[Coordinate]) -> dict[Coordinate, bytes]:
        wanted = list(places)
        if not wanted:
            return {}
        return await _by_place(
            await self._connection.execute(
                _HASHES, ([place.level for place in wanted], [place.position for place in wanted])
            )
        )

    async def page(self, start: int, stop: int) -> list[tuple[int, bytes]]:
        rows = await self._connection.execute(
            "select index, leaf from audit.entries where index >= %s and index < %s order by index", (start, stop)
        )
        return [(row["index"], row["leaf"]) async for row in rows]

    async def extend(self, extension: Extension, checkpoint: Checkpoint, note: str, at: datetime) -> None:
        entries = extension.entries
        # Level 0 stands in the entries.
        nodes = [node for node in extension.nodes if node.level]
        rows = {
            "indices": [entry.index for entry in entries],
            "events": [entry.event_id for entry in entries],
            "leaves": extension.leaves,
            "leaf_hashes": [entry.leaf_hash for entry in entries],
            "levels": [node.level for node in nodes],
            "positions": [node.position for node in nodes],
            "hashes": [node.hash for node in nodes],
            "size": checkpoint.size,
            "root": checkpoint.root,
            "note": note,
            "at": at,
        }
        # One round trip, after which others have the lock.
        async with self._connection.pipeline():
            await self._connection.execute(_EXTEND, rows)
            await self._connection.commit()

    async def add_cosignature(self, cosigned: Cosigned, at: datetime) -> bool:
        cursor = await self._connection.execute(
            "insert into audit.cosignatures (size, hospital_id, public_key, line, cosigned_at, recorded_at)"
            " values (%s, %s, %s, %s, %s, %s) on conflict do nothing",
            (cosigned.size, cosigned.hospital_id, cosigned.public_key, cosigned.line, cosigned.cosigned_at, at),
        )
        return cursor.rowcount == 1

    async def cosigned(self, before_size: int, limit: int) -> list[CosignedHead]:
        rows = await self._connection.execute(_COSIGNED, (before_size, limit))
        found: dict[int, CosignedHead] = {}
        async for row in rows:
            one = Cosigned(row["size"], row["hospital_id"], bytes(row["public_key"]), row["line"], row["cosigned_at"])
            before = found.get(one.size)
            known = () if before is None else before.cosigned
            found[one.size] = CosignedHead(one.size, row["note"], row["recorded_at"], (*known, one))
        return list(found.values())

    async def cosigned_sizes(self, newest: int | None) -> dict[str, int]:
        rows = await self._connection.execute(
            "select hospital_id, max(size) as size"
            " from (select hospital_id, size from audit.cosignatures order by size desc limit %s) as newest"
            " group by hospital_id",
            (newest,),
        )
        return {row["hospital_id"]: row["size"] async for row in rows}

    async def uncosigned_ages(self, sizes: Mapping[str, int]) -> dict[str, float]:
        rows = await self._connection.execute(
            "select known.hospital_id,"
            " extract(epoch from clock_timestamp() - above.recorded_at)::double precision as age"
            " from unnest(%s::text[], %s::bigint[]) as known (hospital_id, size)"
            " left join lateral (select recorded_at from audit.checkpoints c where c.size > known.size"
            "   order by c.size limit 1) as above on true",
            (list(sizes), list(sizes.values())),
        )
        return {row["hospital_id"]: max(0.0, row["age"] or 0.0) async for row in rows}

    async def add_alarm(self, alarm: Alarm) -> bool:
        cursor = await self._connection.execute(
            "insert into audit.alarms (alarm_id, hospital_id, kind, held_checkpoint, seen_checkpoint, reason,"
            " recorded_at) values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
            (
                alarm.alarm_id,
                alarm.hospital_id,
                alarm.kind.value,
                alarm.held,
                alarm.seen,
                alarm.reason,
                alarm.recorded_at,
            ),
        )
        return cursor.rowcount == 1

    async def alarm_count(self, hospital_id: str | None = None) -> int:
        cursor = await self._connection.execute(
            "select count(*) as number from audit.alarms where %(who)s::text is null or hospital_id = %(who)s",
            {"who": hospital_id},
        )
        row = await cursor.fetchone()
        return 0 if row is None else int(row["number"])

    async def alarms(self, limit: int) -> list[Alarm]:
        rows = await self._connection.execute(
            "select hospital_id, kind, held_checkpoint, seen_checkpoint, reason, recorded_at from audit.alarms"
            " order by recorded_at desc limit %s",
            (limit,),
        )
        return [
            Alarm(
                row["hospital_id"],
                AlarmKind(row["kind"]),
                row["held_checkpoint"],
                row["seen_checkpoint"],
                row["reason"],
                row["recorded_at"],
            )
            async for row in rows
        ]


async def _by_place(rows: AsyncCursor[DictRow]) -> dict[Coordinate, bytes]:
    found = {Coordinate(row["level"], row["position"]): row["hash"] async for row in rows}
    if any(value is None for value in found.values()):
        raise FedmeshError(Code.WRONG_STATE, "a hash of the tree is missing: the database was changed by hand")
    return found


def _missing(index: int) -> FedmeshError:
    return FedmeshError(Code.WRONG_STATE, f"entry {index} is missing: the database was changed by hand")


def _head(row: dict[str, Any] | None) -> Head | None:
    return None if row is None else Head(row["size"], row["root"], row["note"])


class PostgresStore:
    """Implements `services.audit.ports.Store`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, name: str, body: Callable[[Transaction], Awaitable[T]], *, appends: bool = False) -> T:
        # Under REPEATABLE READ the snapshot would be older than the wait for the lock; each statement after it must see
        # what the lock's last holder committed.
        isolation = IsolationLevel.READ_COMMITTED if appends else IsolationLevel.REPEATABLE_READ
        return await self._database.run_tx(
            f"audit.{name}", lambda connection: body(PostgresTransaction(connection)), isolation
        )
