"""How a batch of requests extends the tree: pure, so that a transaction may be run again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from services.audit.domain.event import Leaf
from services.common.errors import Code, FedmeshError
from services.transparency.merkle import Coordinate, Frontier, Node, leaf_hash


@dataclass(frozen=True)
class Entry:
    """An event in the log."""

    index: int
    event_id: UUID
    leaf_hash: bytes


Outcome = tuple[Entry, ...] | FedmeshError
"""The entries of one request in its order, or why none of its events was taken."""


@dataclass
class Extension:
    """What a batch adds to the log, and what each of its requests is told. leaves: of the entries, in their order."""

    entries: list[Entry] = field(default_factory=list)
    leaves: list[bytes] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def hashes(self) -> dict[Coordinate, bytes]:
        """The new hashes of the tree by place."""
        return {Coordinate(node.level, node.position): node.hash for node in self.nodes}


def extend(frontier: Frontier, known: Mapping[UUID, Entry], requests: Sequence[Sequence[Leaf]]) -> Extension:
    """Append the new events of some requests to the tree, in order; `frontier` grows.

    known: the entries that the log has already for any of these event ids. A request with an event id that stands for
    something else is refused whole, and the other requests are not touched by it.
    """
    made = Extension()
    placed = dict(known)
    for leaves in requests:
        conflict = _conflict(leaves, placed)
        if conflict is not None:
            made.outcomes.append(conflict)
            continue
        for leaf in leaves:
            if leaf.event_id not in placed:
                entry = Entry(frontier.size, leaf.event_id, leaf_hash(leaf.content))
                made.nodes += frontier.append(entry.leaf_hash)
                made.entries.append(entry)
                made.leaves.append(leaf.content)
                placed[leaf.event_id] = entry
        made.outcomes.append(tuple(placed[leaf.event_id] for leaf in leaves))
    return made


def _conflict(leaves: Sequence[Leaf], placed: Mapping[UUID, Entry]) -> FedmeshError | None:
    contents: dict[UUID, bytes] = {}
    for leaf in leaves:
        entry = placed.get(leaf.event_id)
        # Of an entry in an archive there is no more than its hash.
        if entry is not None:
            same = entry.leaf_hash == leaf_hash(leaf.content)
        else:
            same = contents.setdefault(leaf.event_id, leaf.content) == leaf.content
        if not same:
            return FedmeshError(
                Code.REQUEST_ID_REUSED,
                f"event id {leaf.event_id} stands for another event already",
                event_id=leaf.event_id,
            )
    return None
