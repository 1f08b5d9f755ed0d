"""What the use cases of promotion need from a store; a part of `services.registry.usecases.ports.Transaction`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.registry.domain.promotion import (
    Alias,
    Attestation,
    CheckReport,
    Promotion,
    Rollback,
    Spending,
    Tag,
)


class Promotions(Protocol):
    async def add_attestation(self, made: Attestation) -> None: ...

    async def attestation(self, job_id: UUID, version: int) -> Attestation | None: ...

    async def add_report(self, report: CheckReport, at: datetime) -> None:
        """Store a hospital's report. A concurrent one makes the transaction run again."""
        ...

    async def reports(self, job_id: UUID, version: int) -> tuple[CheckReport, ...]:
        """By hospital."""
        ...

    async def spending(self, job_id: UUID) -> Spending:
        """What the transaction may see of it: all, for the consortium."""
        ...

    async def measurements(self, job_id: UUID) -> dict[int, dict[str, float]]:
        """Metrics by version and name."""
        ...

    async def move_alias(self, alias: Alias) -> None: ...

    async def alias(self, model: str, alias: str) -> Alias | None: ...

    async def aliases(self, model: str) -> tuple[Alias, ...]:
        """Where aliases point now, of one model or (empty) of all; 500 at most."""
        ...

    async def aliases_of(self, job_id: UUID, version: int) -> tuple[Alias, ...]:
        """The aliases that point to a version now."""
        ...

    async def set_tag(self, job_id: UUID, version: int, tag: Tag) -> None:
        """An empty value removes the tag."""
        ...

    async def tags(self, job_id: UUID, version: int) -> tuple[Tag, ...]: ...

    async def add(self, promotion: Promotion) -> None: ...

    async def get(self, promotion_id: UUID) -> Promotion | None: ...

    async def approve(self, promotion: Promotion) -> None:
        """Note the approval. A concurrent one makes the transaction run again."""
        ...

    async def of_version(self, job_id: UUID, version: int) -> Sequence[Promotion]:
        """Newest first, 50 at most."""
        ...

    async def add_rollback(self, rollback: Rollback) -> None: ...

    async def rollback(self, job_id: UUID) -> Rollback | None: ...
