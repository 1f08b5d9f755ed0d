"""Checks the whole stored log against itself: everything is derived again from the bodies of the entries.

Leaf hashes, subtree hashes, the root at every checkpoint, signatures of log and witnesses, rows too many or too few. It
reads one snapshot of the database, in one pass and little memory, beside a running service or without one.

Of entries that are in archives alone, the bodies come from these, if they are given; else the tree is derived from the
hashes that the database kept of them, and the report says so.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from services.audit.archive_events import EVENT_TYPE
from services.audit.store.checking import LogReader
from services.common.config import PostgresConfig
from services.common.errors import FedmeshError
from services.common.ids import is_uuid
from services.common.postgres import Connection, Database
from services.transparency.archive import Part, read_leaves, verify_archive
from services.transparency.canonical import parse_canonical
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.cosignature import WitnessKey, verify_line, witness_name
from services.transparency.merkle import Coordinate, Frontier, leaf_hash

_PAGE: Final = 500
_SHOWN: Final = 20
# It hashes between two pages, as slowly as the machine is, and holds up nobody: it only reads.
_AT_LEISURE: Final = (("SET LOCAL idle_in_transaction_session_timeout = '10min'", ()),)


@dataclass
class Report:
    """What was found. problems: the first ones in words; wrong: how many there are altogether.

    entries: whose bodies were read. unread: ranges (first, last, root in hex) whose archives were not given. untold:
    first entries of ranges that went into an archive of which the log does not tell yet.
    """

    entries: int = 0
    unread: list[tuple[int, int, str]] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)
    nodes: int = 0
    checkpoints: int = 0
    cosignatures: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.wrong += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)


async def check_log(config: PostgresConfig, verifier: VerifierKey, archives: Path | None = None) -> Report:
    """Check the log in a database. Any role that may select will do.

    verifier: the log's public key, known from elsewhere than the database. archives: the folder with the archives.

    Raises: FedmeshError(STORE_UNAVAILABLE) when the database is away.
    """
    database = Database(config)
    await database.open()

    async def listed(connection: Connection) -> list[dict[str, Any]]:
        return await LogReader(connection).archived()

    async def check(connection: Connection) -> Report:
        return await _Check(LogReader(connection), verifier, opened).run()

    opened: dict[int, Path | str] = {}
    try:
        if archives is not None:
            # Reading them takes longer than a transaction may idle.
            opened = _opened(archives, await database.run_tx("audit.archived", listed), verifier)
        return await database.run_tx("audit.fsck", check, opening=_AT_LEISURE)
    finally:
        await database.close()


def _opened(archives: Path, rows: Sequence[Mapping[str, Any]], verifier: VerifierKey) -> dict[int, Path | str]:
    """By first entry: the folder of the archive, verified; or what is wrong with it."""
    opened: dict[int, Path | str] = {}
    for row in rows:
        part = Part(row["first_index"], row["level"])
        folder = archives / part.folder
        try:
            found = verify_archive(folder, verifier)
        except FedmeshError as error:
            opened[part.first] = f"their archive: {error.message}"
            continue
        same = (found.part, found.root, found.manifest) == (part, row["root"], row["manifest"])
        opened[part.first] = folder if same else f"{folder} is not the archive that was made of them"
    return opened


class _Check:
    def __init__(self, reader: LogReader, verifier: VerifierKey, archives: Mapping[int, Path | str]) -> None:
        self._reader = reader
        self._verifier = verifier
        self._archives = archives
        self._report = Report()
        self._frontier = Frontier()
        self._newest = 0
        # By the id of their event, what the log tells of archives: first entry and root in hex.
        self._told: dict[str, tuple[Any, Any]] = {}

    async def run(self) -> Report:
        async for page in self._pages():
            start = self._frontier.size
            signed = await self._reader.checkpoints(start, start + len(page))
            if not await self._check_page(page, signed):
                # Without an entry there is no tree: nothing behind the gap can be derived.
                return self._report
        await self._check_end()
        await self._check_cosignatures()
        return self._report

    async def _pages(self) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        for row in await self._reader.archived():
            part = Part(row["first_index"], row["level"])
            leaves = self._open(part, row)
            for start in range(part.first, part.stop, _PAGE):
                hashes = await self._reader.leaf_hashes(start, min(start + _PAGE, part.stop))
                if not hashes:
                    self._report.add(f"entries {start} to {part.stop - 1}: their hashes are missing")
                    return
                yield [
                    {"index": index, "leaf": next(leaves)[1] if leaves else None, "leaf_hash": hashes[index]}
                    for index in sorted(hashes)
                ]
        while page := await self._reader.entries(self._frontier.size, _PAGE):
            yield page

    def _open(self, part: Part, row: Mapping[str, Any]) -> Iterator[tuple[int, bytes]] | None:
        """The bodies of an archived range; None when there is no archive of it that is in order."""
        match self._archives.get(part.first):
            case Path() as folder:
                return read_leaves(folder, part)
            case str(problem):
                self._report.add(f"entries {part.first} to {part.stop - 1}: {problem}")
        self._report.unread.append((part.first, part.stop - 1, row["root"].hex()))
        return None

    async def _check_page(self, page: Sequence[Mapping[str, Any]], signed: Mapping[int, Mapping[str, Any]]) -> bool:
        made: dict[Coordinate, bytes] = {}
        whole = True
        events: dict[str, int] = {}
        for row in page:
            if row["index"] != self._frontier.size:
                self._report.add(f"entry {self._frontier.size} is missing")
                whole = False
                break
            self._check_entry(row, events)
            body = row["leaf"]
            for node in self._frontier.append(row["leaf_hash"] if body is None else leaf_hash(body)):
                if node.level:
                    made[Coordinate(node.level, node.position)] = node.hash
            if self._frontier.size in signed:
                self._check_checkpoint(signed[self._frontier.size])
        await self._check_nodes(made)
        known = await self._reader.events(list(events))
        for event_id, index in events.items():
            if known.get(event_id) != index:
                self._report.add(f"entry {index}: the log does not know its event as this entry")
        return whole

    def _check_entry(self, row: Mapping[str, Any], events: dict[str, int]) -> None:
        """events: the event of the row, and its index, is added to them."""
        if row["leaf"] is None:
            return
        self._report.entries += 1
        index = row["index"]
        if leaf_hash(row["leaf"]) != row["leaf_hash"]:
            self._report.add(f"entry {index}: its body does not have its leaf hash")
        try:
            event = parse_canonical(row["leaf"])
        except ValueError as error:
            self._report.add(f"entry {index}: its body is no canonical JSON: {error}")
            return
        named = str(event.get("event_id"))
        if not is_uuid(named):
            self._report.add(f"entry {index}: its body names no event")
            return
        events[named] = index
        if event.get("type") == EVENT_TYPE:
            self._told[named] = event["body"].get("first"), event["body"].get("root")

    async def _check_nodes(self, made: Mapping[Coordinate, bytes]) -> None:
        stored = await self._reader.nodes(list(made))
        for place, value in made.items():
            self._report.nodes += 1
            if stored.get(place) != value:
                first, last = place.position << place.level, ((place.position + 1) << place.level) - 1
                what = "is missing" if place not in stored else "does not follow from their bodies"
                self._report.add(f"entries {first} to {last}: their subtree hash {what}")

    def _check_checkpoint(self, row: Mapping[str, Any]) -> None:
        self._report.checkpoints += 1
        self._newest = row["size"]
        where = f"checkpoint over {row['size']} entries"
        if row["root"] != self._frontier.root():
            self._report.add(f"{where}: its root does not follow from their bodies")
        try:
            said = open_checkpoint(row["note"], self._verifier)
        except FedmeshError as error:
            self._report.add(f"{where}: {error.message}")
            return
        if (said.size, said.root) != (row["size"], row["root"]):
            self._report.add(f"{where}: the signed note says another size or root")

    async def _check_end(self) -> None:
        size = self._frontier.size
        if size > self._newest:
            self._report.add(
                f"entries {self._newest} to {size - 1} are under no checkpoint: the log did not append them"
            )
        for beyond in await self._reader.checkpoints_beyond(size):
            self._report.add(f"checkpoint over {beyond} entries: there are only {size}")
        for level, position in await self._reader.nodes_beyond(size):
            self._report.add(f"subtree hash at level {level}, position {position}: there are no such entries")
        archived = await self._reader.archived()
        online = size - (archived[-1]["stop_index"] if archived else 0)
        checked = {
            "entries": online,
            "events": size,
            "nodes": self._report.nodes + size - online,
            "checkpoints": self._report.checkpoints,
        }
        await self._check_archived(archived)
        for table, stored in (await self._reader.counts()).items():
            if stored != checked[table]:
                self._report.add(f"audit.{table} has {stored} rows, of which {checked[table]} belong there")

    async def _check_archived(self, archived: Sequence[Mapping[str, Any]]) -> None:
        roots = await self._reader.nodes(
            [Coordinate(row["level"], row["first_index"] >> row["level"]) for row in archived]
        )
        for row in archived:
            place = Coordinate(row["level"], row["first_index"] >> row["level"])
            where = f"archive of entries {row['first_index']} to {row['stop_index'] - 1}"
            if roots.get(place) != row["root"]:
                self._report.add(f"{where}: its root is not that of the tree")
            event_id = str(row["event_id"])
            if event_id in self._told and self._told[event_id] != (row["first_index"], row["root"].hex()):
                self._report.add(f"{where}: the log tells of another one")
            elif event_id not in self._told and not await self._reader.events([event_id]):
                self._report.untold.append(row["first_index"])

    async def _check_cosignatures(self) -> None:
        after = (0, "")
        while page := await self._reader.cosignatures(after, _PAGE):
            for row in page:
                self._check_cosignature(row)
            after = (page[-1]["size"], page[-1]["hospital_id"])

    def _check_cosignature(self, row: Mapping[str, Any]) -> None:
        self._report.cosignatures += 1
        where = f"cosignature of {row['hospital_id']} over {row['size']} entries"
        if row["note"] is None:
            self._report.add(f"{where}: there is no such checkpoint")
            return
        consortium = self._verifier.name.removesuffix("/audit")
        key = WitnessKey(witness_name(consortium, row["hospital_id"]), row["public_key"])
        try:
            verify_line(row["note"], row["line"], key)
        except FedmeshError as error:
            self._report.add(f"{where}: {error.message}")
