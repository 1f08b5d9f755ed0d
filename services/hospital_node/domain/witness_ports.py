"""What witnessing the audit log needs from the world, as protocols, and what is kept of it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol


class RefusalKind(StrEnum):
    """Why a witness does not cosign."""

    FORK = "fork"
    ROLLBACK = "rollback"
    BAD_CHECKPOINT = "bad_checkpoint"
    UNPROVABLE = "unprovable"


@dataclass(frozen=True)
class Refusal:
    """Evidence: two checkpoints, as signed notes, of which the second does not follow from the first.

    held: the newest one that was verified here, empty when there was none. seen: the one refused, as it came.
    """

    log: str
    kind: RefusalKind
    held: str
    seen: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class Held:
    """The newest checkpoint of a log that was verified here. cosigned: its cosignature has arrived at the log."""

    size: int
    root: bytes
    note: str
    cosigned: bool


class AuditLog(Protocol):
    """The calls of the audit service that a witness makes. Every method raises FedmeshError as the service did."""

    async def offered(self) -> str:
        """The checkpoint to cosign, a signed note; nothing of it is verified."""
        ...

    async def consistency(self, first_size: int, second_size: int) -> list[bytes]:
        """A proof that the tree of `first_size` entries is a prefix of the one of `second_size`."""
        ...

    async def inclusion(self, index: int, size: int) -> tuple[bytes, list[bytes]]:
        """The leaf hash of an entry, and the proof that it is in the tree of `size` entries, leaf to root."""
        ...

    async def add_cosignature(self, size: int, public_key: bytes, line: str) -> None: ...

    async def raise_alarm(self, refusal: Refusal) -> None: ...


class WitnessMemory(Protocol):
    """What a witness must not forget. `log` is a verifier key as text. Every method is durable on return."""

    def held(self, log: str) -> Held | None: ...

    def hold(self, log: str, before: Held | None, now: Held) -> None:
        """Replace what is held.

        Raises: FedmeshError(LOST_RACE) when it is not `before` any more.
        """
        ...

    def mark_cosigned(self, log: str, size: int) -> None: ...

    def keep_evidence(self, refusal: Refusal) -> tuple[Refusal, bool]:
        """Keep a refusal for good, the first one of its kind that contradicts what is held; that one, and whether it
        is new. Of a log that gave many reasons already, it is not kept: it is answered as it came, and not as new."""
        ...
