"""What the recovery of a ledger that was lost needs from the disk and from the registry."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from services.hospital_node.domain.ports import LedgerStanding
from services.privacy.chain import Entry, Head
from services.privacy.recovery import Recovery


class LostLedger(Protocol):
    """The place of a ledger, and a new one that is built beside it."""

    def require_lost(self) -> None:
        """Check that there is no ledger, or one in which nothing was ever written.

        Raises: FedmeshError(WRONG_STATE) for any other, also one that is damaged or old: what it holds may be needed.
        """
        ...

    def kept_head(self) -> Head:
        """The head in the ledger's second file; the empty one where that is lost too.

        Raises: FedmeshError(CONFIG_INVALID, STORE_UNAVAILABLE) for a file that cannot be read.
        """
        ...

    def build(self, entries: Sequence[Entry], recovery: Recovery, now: datetime) -> Entry:
        """Build a ledger beside the place from entries, and return the one of the recovery, which it ends with.

        Raises: FedmeshError(STATEMENT_INVALID) for entries that no ledger can have, (STORE_FULL, STORE_UNAVAILABLE).
        """
        ...

    def built(self) -> Entry | None:
        """The last entry of a ledger that was built and is not in its place; None when there is none."""
        ...

    def install(self) -> None:
        """Move the ledger that was built into its place, where `require_lost` found none."""
        ...


class LedgerCopy(Protocol):
    """The registry's copy of this hospital's ledger."""

    async def head(self) -> tuple[LedgerStanding, int]:
        """The newest entry, and for how many contributions the registry knows of no charge. Raises: FedmeshError."""
        ...

    async def entries_after(self, seq: int) -> Sequence[Entry]:
        """The next entries above a number, oldest first. Raises: FedmeshError."""
        ...

    async def report(self, head: Head, signature: bytes, entries: Sequence[Entry]) -> LedgerStanding:
        """Report entries. Raises: FedmeshError."""
        ...
