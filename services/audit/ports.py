"""What the use cases need from a store. `services.audit.store` implements it on PostgreSQL."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar
from uuid import UUID

from services.audit.domain.batch import Entry, Extension
from services.audit.domain.witnesses import Alarm, Cosigned
from services.common.errors import Code, FedmeshError
from services.transparency.checkpoint import Checkpoint
from services.transparency.merkle import Coordinate

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """A checkpoint: size and root (32 bytes) of the tree, and the signed note over them."""

    size: int
    root: bytes
    note: str


@dataclass(frozen=True)
class Beginning:
    """What an append goes on from.

    head: the newest checkpoint, None for an empty log. edge: the hashes of its tree's maximal complete subtrees. known:
    what the log has already of the events that are to be appended. room: a tree of more entries than these is to have
    another partition.
    """

    head: Head | None
    edge: dict[Coordinate, bytes]
    known: dict[UUID, Entry]
    room: int


@dataclass(frozen=True)
class Archived:
    """Entries from `first` up to, and without, `stop`, which are in an archive alone.

    root: of their subtree at this level, 32 bytes. manifest: the archive's, as text. detached_by: role in the database.
    event_id: of the event that tells of it; told: whether the log has it.
    """

    first: int
    stop: int
    level: int
    root: bytes
    manifest: str
    detached_by: str
    event_id: UUID
    recorded_at: datetime
    told: bool


@dataclass(frozen=True)
class StoredPart:
    """A partition that is full and in the database: the subtree of 2^level entries from `first` on.

    newest: when its last entry was recorded. aged: whether that is as long ago as was asked for. keep_until: six years
    after it.
    """

    first: int
    level: int
    newest: datetime
    aged: bool
    keep_until: datetime


def require_online(index: int, archived: Sequence[Archived]) -> None:
    """Raises: FedmeshError(NOT_FOUND) naming the archive when the entry is in one."""
    for part in archived:
        if part.first <= index < part.stop:
            raise FedmeshError(
                Code.NOT_FOUND,
                f"entry {index} is not in the database: entries {part.first} to {part.stop - 1} are in an archive "
                f"since {part.recorded_at:%Y-%m-%d} (root {part.root.hex()}); the database has entries from "
                f"{archived[-1].stop} on",
                archived_first=part.first,
                archived_last=part.stop - 1,
                online_from=archived[-1].stop,
            )


@dataclass(frozen=True)
class CosignedHead:
    """A checkpoint, when it was signed, and its cosignatures."""

    size: int
    note: str
    recorded_at: datetime
    cosigned: tuple[Cosigned, ...]


class Transaction(Protocol):
    async def begin_append(self, event_ids: Sequence[UUID]) -> Beginning:
        """Wait until this transaction is the only one that may extend the log. Must be the first call in it.

        Raises: FedmeshError(WRONG_STATE) when the store lacks a hash of the tree's edge.
        """
        ...

    async def head(self) -> Head | None:
        """The newest checkpoint; None for an empty log."""
        ...

    async def hashes(self, places: Iterable[Coordinate]) -> dict[Coordinate, bytes]:
        """The hashes of complete subtrees.

        Raises: FedmeshError(WRONG_STATE) when the store lacks one.
        """
        ...

    async def page(self, start: int, stop: int) -> list[tuple[int, bytes]]:
        """Index and leaf of the entries from `start` up to, and without, `stop`; fewer when they are large."""
        ...

    async def make_room(self, size: int) -> None:
        """Make the partitions for a tree of this size, and one beyond, as soon as that disturbs nobody.

        Raises: FedmeshError(STORE_UNAVAILABLE) when those that the tree itself needs cannot be made now.
        """
        ...

    async def extend(self, extension: Extension, checkpoint: Checkpoint, note: str, at: datetime) -> None:
        """Write new entries, hashes and the checkpoint over them, and commit. Must be the last call in it."""
        ...

    async def leaf(self, index: int) -> bytes:
        """The leaf of an entry.

        Raises: FedmeshError(NOT_FOUND) when it is in an archive, (WRONG_STATE) when the store lacks it.
        """
        ...

    async def leaf_hash(self, index: int) -> bytes:
        """The leaf hash of an entry: of its body as it is stored now, or the one that was kept of an archived entry.

        Raises: FedmeshError(WRONG_STATE) when the store lacks the entry.
        """
        ...

    async def full_parts(self, months: int) -> list[StoredPart]:
        """The partitions that are full and in the database, in order. aged: by so many months."""
        ...

    async def archived(self) -> list[Archived]:
        """The ranges that are in archives alone, in order: they adjoin, from entry 0 on."""
        ...

    async def offered(self, period_s: float) -> Head | None:
        """The newest checkpoint of the last full period by the database's clock, or else the first one there is."""
        ...

    async def checkpoint(self, size: int) -> Head | None:
        """The checkpoint of a tree of this size, if one was signed."""
        ...

    async def add_cosignature(self, cosigned: Cosigned, at: datetime) -> bool:
        """Store a cosignature; False when the hospital has one for this size already."""
        ...

    async def cosigned(self, before_size: int, limit: int) -> list[CosignedHead]:
        """Checkpoints with cosignatures, newest first, of fewer than `before_size` entries."""
        ...

    async def cosigned_sizes(self, newest: int | None) -> dict[str, int]:
        """The largest tree that each hospital cosigned, among so many of the newest cosignatures; None: among all."""
        ...

    async def uncosigned_ages(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """For how many seconds the log has had a checkpoint above the size that a hospital cosigned; 0 without one."""
        ...

    async def add_alarm(self, alarm: Alarm) -> bool:
        """Store an alarm; False when it is there already."""
        ...

    async def alarm_count(self, hospital_id: str | None = None) -> int:
        """How many alarms there are, of one hospital or altogether."""
        ...

    async def alarms(self, limit: int) -> list[Alarm]:
        """Alarms, newest first."""
        ...


class Store(Protocol):
    async def run(self, name: str, body: Callable[[Transaction], Awaitable[T]], *, appends: bool = False) -> T:
        """Run `body` in one transaction; it may be run several times. appends: it begins with `begin_append`.

        Raises: FedmeshError(STORE_UNAVAILABLE | STORE_FULL | LOST_RACE); whatever `body` raises.
        """
        ...
