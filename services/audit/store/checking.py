"""Reads the tables of the log as they are, for a check of the whole: nothing is believed, nothing is left out."""

from collections.abc import Sequence
from typing import Any

from services.common.postgres import Connection
from services.transparency.merkle import Coordinate

Row = dict[str, Any]
# Of what is too much in a table, so many are named.
_BEYOND = 100


class LogReader:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def entries(self, start: int, limit: int) -> list[Row]:
        """Entries from an index on, in order."""
        return await self._rows(
            "select index, leaf, leaf_hash from audit.entries where index >= %s order by index limit %s",
            (start, limit),
        )

    async def leaf_hashes(self, start: int, stop: int) -> dict[int, bytes]:
        """The hashes that were kept of archived entries, by index."""
        rows = await self._rows(
            "select position, hash from audit.nodes where level = 0 and position >= %s and position < %s", (start, stop)
        )
        return {row["position"]: row["hash"] for row in rows}

    async def archived(self) -> list[Row]:
        """The ranges that are in archives alone, in order."""
        return await self._rows(
            "select a.first_index, p.stop_index, p.level, a.root, a.manifest, a.event_id"
            " from audit.archives a join audit.partitions p using (first_index) order by a.first_index",
            (),
        )

    async def events(self, event_ids: Sequence[str]) -> dict[str, int]:
        """The index that the log knows these events by."""
        rows = await self._rows(
            "select event_id::text, index from audit.events where event_id = any(%s::uuid[])", (list(event_ids),)
        )
        return {row["event_id"]: row["index"] for row in rows}

    async def checkpoints(self, above: int, up_to: int) -> dict[int, Row]:
        """Checkpoints over more than `above` and at most `up_to` entries, by size."""
        rows = await self._rows(
            "select size, root, note from audit.checkpoints where size > %s and size <= %s", (above, up_to)
        )
        return {row["size"]: row for row in rows}

    async def nodes(self, places: Sequence[Coordinate]) -> dict[Coordinate, bytes]:
        """The stored hashes of these subtrees, as far as they are there."""
        rows = await self._rows(
            "select level, position, hash from audit.nodes join unnest(%s::smallint[], %s::bigint[])"
            " as wanted (level, position) using (level, position)",
            ([place.level for place in places], [place.position for place in places]),
        )
        return {Coordinate(row["level"], row["position"]): row["hash"] for row in rows}

    async def checkpoints_beyond(self, size: int) -> list[int]:
        """Sizes of checkpoints over more entries than there are."""
        rows = await self._rows(
            "select size from audit.checkpoints where size > %s order by size limit %s", (size, _BEYOND)
        )
        return [row["size"] for row in rows]

    async def nodes_beyond(self, size: int) -> list[Coordinate]:
        """Subtrees that reach beyond the entries that there are."""
        rows = await self._rows(
            "select level, position from audit.nodes where (position + 1) * 2::numeric ^ level > %s"
            " order by level, position limit %s",
            (size, _BEYOND),
        )
        return [Coordinate(row["level"], row["position"]) for row in rows]

    async def counts(self) -> dict[str, int]:
        """Rows of the log's tables, whatever is in them."""
        (row,) = await self._rows(
            "select (select count(*) from audit.entries) as entries, (select count(*) from audit.nodes) as nodes,"
            " (select count(*) from audit.events) as events,"
            " (select count(*) from audit.checkpoints) as checkpoints",
            (),
        )
        return row

    async def cosignatures(self, after: tuple[int, str], limit: int) -> list[Row]:
        """Cosignatures after (size, hospital), in that order, each with the note that it is under, or none."""
        return await self._rows(
            "select s.size, s.hospital_id, s.public_key, s.line, c.note from audit.cosignatures s"
            " left join audit.checkpoints c using (size) where (s.size, s.hospital_id) > (%s, %s)"
            " order by s.size, s.hospital_id limit %s",
            (*after, limit),
        )

    async def _rows(self, query: str, values: tuple[Any, ...]) -> list[Row]:
        cursor = await self._connection.execute(query.encode(), values)
        return await cursor.fetchall()
