"""The signed statements of an attempt, as the store holds them: named, fetched by phase, kept while they are fixed."""

from collections import defaultdict
from collections.abc import Sequence

from services.common.errors import Code, FedmeshError
from services.coordinator.domain.attempt import Attempt, AttemptId
from services.coordinator.ports import Rounds
from services.secure_sum.statements import Signed


def advert_field(hospital_id: str) -> str:
    return f"advert:{hospital_id}"


def share_field(sender: str, recipient: str) -> str:
    return f"share:{sender}:{recipient}"


def upload_field(hospital_id: str) -> str:
    return f"upload:{hospital_id}"


def confirmation_field(hospital_id: str) -> str:
    return f"confirmation:{hospital_id}"


def reveal_field(hospital_id: str) -> str:
    return f"reveal:{hospital_id}"


class Shelf:
    """What was fetched for the newest attempt asked for is kept, as far as it is fixed by the attempt's phase.

    Raises: FedmeshError(LOST_RACE) when the store has lost a statement, or has another attempt's: look again.
    """

    def __init__(self, store: Rounds) -> None:
        self._store = store
        self._of: AttemptId | None = None
        self._held: dict[str, tuple[Signed, ...]] = {}

    async def adverts(self, attempt: Attempt) -> tuple[Signed, ...]:
        """The adverts of the sealed group, sorted by hospital."""
        fields = [(advert_field(name), name) for name in attempt.group]
        return await self._kept("adverts", attempt, fields)

    async def new_adverts(self, attempt: Attempt, group: Sequence[str]) -> tuple[Signed, ...]:
        """The adverts of a group that is about to be sealed."""
        return await self._all(attempt, [(advert_field(name), name) for name in group])

    async def shares(self, attempt: Attempt) -> tuple[Signed, ...]:
        """All shares between sharers, sorted by sender and recipient."""
        return await self._kept("shares", attempt, _share_fields(attempt))

    async def shares_by_recipient(self, attempt: Attempt) -> dict[str, list[Signed]]:
        found: dict[str, list[Signed]] = defaultdict(list)
        pairs = [(sender, name) for sender in attempt.sharers for name in attempt.sharers if name != sender]
        for (_, recipient), signed in zip(pairs, await self.shares(attempt), strict=True):
            found[recipient].append(signed)
        return found

    async def shares_for(self, attempt: Attempt, recipient: str) -> tuple[Signed, ...]:
        """The shares that the other sharers sealed for one."""
        senders = [name for name in attempt.sharers if name != recipient]
        return await self._all(attempt, [(share_field(name, recipient), name) for name in senders])

    async def uploads_sent(self, attempt: Attempt) -> dict[str, Signed]:
        """The uploads that sharers have reported so far."""
        fields = [(upload_field(name), name) for name in attempt.sharers]
        found = await self._store.statements(attempt.job_id, fields)
        return {signed.hospital_id: signed for signed in found if signed is not None}

    async def uploads(self, attempt: Attempt) -> tuple[Signed, ...]:
        """The survivors' uploads."""
        return await self._kept("uploads", attempt, [(upload_field(name), name) for name in attempt.survivor_ids])

    async def confirmations(self, attempt: Attempt, names: Sequence[str]) -> dict[str, bytes]:
        """Signatures over the list of survivors."""
        found = await self._all(attempt, [(confirmation_field(name), name) for name in names])
        return {signed.hospital_id: signed.signature for signed in found}

    async def reveals(self, attempt: Attempt, names: Sequence[str]) -> tuple[Signed, ...]:
        return await self._all(attempt, [(reveal_field(name), name) for name in names])

    async def _kept(self, what: str, attempt: Attempt, fields: list[tuple[str, str]]) -> tuple[Signed, ...]:
        if self._of != attempt.id:
            self._of, self._held = attempt.id, {}
        if what not in self._held:
            self._held[what] = await self._all(attempt, fields)
        return self._held[what]

    async def _all(self, attempt: Attempt, fields: list[tuple[str, str]]) -> tuple[Signed, ...]:
        found = await self._store.statements(attempt.job_id, fields)
        present = tuple(signed for signed in found if signed is not None)
        if len(present) != len(fields):
            raise FedmeshError(Code.LOST_RACE, "statements of the attempt are gone: it was lost, or is over")
        return present


def _share_fields(attempt: Attempt) -> list[tuple[str, str]]:
    return [
        (share_field(sender, name), sender) for sender in attempt.sharers for name in attempt.sharers if name != sender
    ]
