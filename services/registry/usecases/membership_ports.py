"""What changes of membership need from a store."""

from typing import Protocol
from uuid import UUID

from services.registry.domain.membership import MembershipChange


class MembershipChanges(Protocol):
    async def add(self, change: MembershipChange) -> None: ...

    async def get(self, change_id: UUID) -> MembershipChange | None: ...

    async def has_token(self, token_sha256: str) -> bool:
        """Whether a token stands in a change, approved or not."""
        ...

    async def approve(self, change: MembershipChange) -> None:
        """Note the approval. A concurrent one makes the transaction run again."""
        ...

    async def list(self) -> tuple[MembershipChange, ...]:
        """Newest first, 200 at most."""
        ...
