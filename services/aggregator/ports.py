"""What the aggregator needs from its stores. `services.aggregator.store` implements it on Redis and in a directory."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Protocol

from services.aggregator.domain.sums import AttemptId, Blob, Contribution, Opened, Sum

FixResult = Literal["ok", "other", "open", "gone"]
FinishResult = Literal["ok", "other", "gone"]


class Sums(Protocol):
    """The records of sums, which alone say who is counted; each method is one atomic transition.

    All methods raise FedmeshError(STORE_UNAVAILABLE | STORE_FULL) while the store is away or full.
    """

    async def open(self, attempt: AttemptId, opened: Opened, expires_at: datetime) -> bool:
        """Open a sum; False when one with another content is there."""
        ...

    async def get(self, attempt: AttemptId) -> Sum | None:
        """The sum's record, or None when it was not opened or is over."""
        ...

    async def count(self, attempt: AttemptId, hospital_id: str, contribution: Contribution) -> None:
        """Count an upload whose segments are all stored, if the sum is open and none of the hospital's is counted."""
        ...

    async def mark_recorded(self, attempt: AttemptId, hospital_ids: Sequence[str]) -> None:
        """Note that the events of these contributors are durable."""
        ...

    async def close(self, attempt: AttemptId, minimum: int) -> Sum | int | None:
        """Fix who was counted; the number of contributors when that is below `minimum`; None without a sum."""
        ...

    async def fix(self, attempt: AttemptId, inputs: str) -> FixResult:
        """Fix what the sum is computed from."""
        ...

    async def finish(self, attempt: AttemptId, inputs: str, blob: Blob, sha256: str) -> FinishResult:
        """Switch the sum to its result, whose segments are all stored."""
        ...

    async def discard(self, attempt: AttemptId) -> None:
        """Forget a sum's record at once."""
        ...


class ChunkStore(Protocol):
    """All methods raise FedmeshError(STORE_UNAVAILABLE | STORE_FULL) while the store is away or full."""

    async def write(self, blob: Blob, index: int, content: bytes) -> None:
        """Store a chunk. Writing the same again is harmless; other bytes under the same name are never written."""
        ...

    async def read_each(self, blobs: Sequence[Blob], index: int) -> list[bytes | None]:
        """The same chunk of each blob; None where it was never written, is over, or is damaged."""
        ...

    async def read(self, blob: Blob, index: int) -> bytes | None:
        """As `read_each`, of one blob."""
        return (await self.read_each([blob], index))[0]

    async def drop(self, blob: Blob, count: int) -> None:
        """Forget the chunks below `count`; harmless when there are none."""
        ...

    async def ready(self) -> bool:
        """Whether the store answers."""
        ...
