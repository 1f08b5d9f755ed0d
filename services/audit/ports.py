"""What the use cases need from a store. `services.audit.store` implements it on PostgreSQL."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar
from uuid import UUID

from services.audit.domain.batch import Entry, Extension
from services.audit.domain.witnesses import Alarm, Cosigned
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
    what the log has already of the events that are to be appended.
    """

    head: Head | None
    edge: dict[Coordinate, bytes]
    known: dict[UUID, Entry]


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

    async def extend(self, extension: Extension, checkpoint: Checkpoint, note: str, at: datetime) -> None:
        """Write new entries, hashes and the checkpoint over them, and commit. Must be the last call in it."""
        ...

    async def leaf(self, index: int) -> bytes:
        """The leaf of an entry.

        Raises: FedmeshError(WRONG_STATE) when the store lacks it.
        """
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
