"""The consortium's rosters, verified once each."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import Roster, verify_founding, verify_successor


class SignedRoster(NamedTuple):
    """A roster statement with its signatures by hospital."""

    statement: bytes
    signatures: Mapping[str, bytes]


class RosterSource(Protocol):
    async def rosters(self, after_version: int) -> Sequence[SignedRoster]:
        """The rosters after a version, oldest first. Raises: FedmeshError."""
        ...


class Rosters:
    """Follows the registry's list from the founding roster on. The registry cannot make one up: members sign them."""

    def __init__(self, source: RosterSource) -> None:
        self._source = source
        self._known: dict[str, Roster] = {}
        self._newest: Roster | None = None
        self._loading = asyncio.Lock()

    async def get(self, sha256: str) -> Roster:
        """The roster with this SHA-256.

        Raises: FedmeshError(SERVICE_UNAVAILABLE) when the registry has no such roster, or none that verifies.
        """
        if sha256 not in self._known:
            async with self._loading:
                if sha256 not in self._known:
                    await self._load()
        if sha256 not in self._known:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"the registry has no roster {sha256[:16]} yet: try again")
        return self._known[sha256]

    async def _load(self) -> None:
        newest = self._newest
        listed = await self._source.rosters(newest.statement.version if newest is not None else 0)
        for item in listed:
            try:
                if newest is None:
                    newest = verify_founding(item.statement, item.signatures)
                else:
                    newest = verify_successor(newest, item.statement, item.signatures)
            except FedmeshError as error:
                raise FedmeshError(
                    Code.SERVICE_UNAVAILABLE, f"the registry's rosters do not verify: {error.message}"
                ) from error
            self._known[newest.sha256] = self._newest = newest
