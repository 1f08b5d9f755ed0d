"""Checks the whole stored log against itself: everything is derived again from the bodies of the entries.

Leaf hashes, subtree hashes, the root at every checkpoint, signatures of log and witnesses, rows too many or too few. It
reads one snapshot of the database, in one pass and little memory, beside a running service or without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from services.audit.store.checking import LogReader
from services.common.config import PostgresConfig
from services.common.errors import FedmeshError
from services.common.postgres import Connection, Database
from services.transparency.canonical import parse_canonical
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.cosignature import WitnessKey, verify_line, witness_name
from services.transparency.merkle import Coordinate, Frontier, leaf_hash

_PAGE: Final = 500
_SHOWN: Final = 20


@dataclass
class Report:
    """What was found. problems: the first ones in words; wrong: how many there are altogether."""

    entries: int = 0
    nodes: int = 0
    checkpoints: int = 0
    cosignatures: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.wrong += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)


async def check_log(config: PostgresConfig, verifier: VerifierKey) -> Report:
    """Check the log in a database. Any role that may select will do.

    verifier: the log's public key, known from elsewhere than the database.

    Raises: FedmeshError(STORE_UNAVAILABLE) when the database is away.
    """
    database = Database(config)
    await database.open()

    async def check(connection: Connection) -> Report:
        return await _Check(LogReader(connection), verifier).run()

    try:
        return await database.run_tx("audit.fsck", check)
    finally:
        await database.close()


class _Check:
    def __init__(self, reader: LogReader, verifier: VerifierKey) -> None:
        self._reader = reader
        self._verifier = verifier
        self._report = Report()
        self._frontier = Frontier()
        self._newest = 0

    async def run(self) -> Report:
        while page := await self._reader.entries(self._frontier.size, _PAGE):
            start = self._frontier.size
            signed = await self._reader.checkpoints(start, start + len(page))
            if not await self._check_page(page, signed):
                # Without an entry there is no tree: nothing behind the gap can be derived.
                return self._report
        await self._check_end()
        await self._check_cosignatures()
        return self._report

    async def _check_page(self, page: Sequence[Mapping[str, Any]], signed: Mapping[int, Mapping[str, Any]]) -> bool:
        made: dict[Coordinate, bytes] = {}
        whole = True
        for row in page:
            if row["index"] != self._frontier.size:
                self._report.add(f"entry {self._frontier.size} is missing")
                whole = False
                break
            self._check_entry(row)
            for node in self._frontier.append(leaf_hash(row["leaf"])):
                if node.level:
                    made[Coordinate(node.level, node.position)] = node.hash
            if self._frontier.size in signed:
                self._check_checkpoint(signed[self._frontier.size])
        await self._check_nodes(made)
        return whole

    def _check_entry(self, row: Mapping[str, Any]) -> None:
        self._report.entries += 1
        index = row["index"]
        if leaf_hash(row["leaf"]) != row["leaf_hash"]:
            self._report.add(f"entry {index}: its body does not have its leaf hash")
        try:
            named = parse_canonical(row["leaf"]).get("event_id")
        except ValueError as error:
            self._report.add(f"entry {index}: its body is no canonical JSON: {error}")
            return
        if named != str(row["event_id"]):
            self._report.add(f"entry {index}: its row names another event than its body")

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
        checked = {"entries": size, "nodes": self._report.nodes, "checkpoints": self._report.checkpoints}
        for table, stored in (await self._reader.counts()).items():
            if stored != checked[table]:
                self._report.add(f"audit.{table} has {stored} rows, of which {checked[table]} belong there")

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
