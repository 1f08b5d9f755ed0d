"""Keeping the keys of epochs: taking what other members made, making them when it is this hospital's turn, and
destroying the group keys that no attempt uses any more."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import EpochFacts, EpochStore, Mesh, Worker
from services.hospital_node.usecases.rosters import Rosters
from services.secure_sum.epoch import EpochKeys, make_epoch, maker_order, open_epoch
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import Signed

log = get_logger(__name__)

TURN_S: Final = 5.0
"""The member at position k of the maker order waits for k of these before it makes a due epoch."""

_LOOK_S: Final = 60.0
_SOON_S: Final = 1.0
_PATIENCE_S: Final = 5.0
# An attempt that was opened just before the next epoch began has not reached this hospital yet.
_RETIRE_AFTER: Final = timedelta(minutes=10)


class Epochs:
    """in_use: (roster, epoch) of the attempts that are kept."""

    def __init__(
        self,
        keys: MemberKeys,
        rosters: Rosters,
        store: EpochStore,
        mesh: Mesh,
        worker: Worker,
        clock: Clock,
        in_use: Callable[[], set[tuple[str, int]]],
    ) -> None:
        self._keys = keys
        self._rosters = rosters
        self._store = store
        self._mesh = mesh
        self._worker = worker
        self._clock = clock
        self._in_use = in_use
        self._known: dict[tuple[str, int], EpochKeys] = {}
        self._asking = asyncio.Lock()

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the newest epoch's keys; empty while there is none."""
        mine = [kept.epoch for kept in self._store.kept() if kept.roster_sha256 == self._rosters.newest.sha256]
        keys = self._stored(self._rosters.newest.sha256, max(mine)) if mine else None
        return keys.sha256[:16] if keys is not None else ""

    async def get(self, roster: Roster, epoch: int, patience_s: float) -> EpochKeys:
        """The keys of an epoch; without a group key when that was destroyed.

        Raises: FedmeshError(NOT_FOUND) when nobody published it; (STATEMENT_INVALID) when it is not in order.
        """
        found = self._stored(roster.sha256, epoch)
        if found is not None:
            return found
        async with self._asking:
            found = self._stored(roster.sha256, epoch)
            if found is not None:
                return found
            facts = await self._mesh.get_epoch(roster.sha256, epoch, patience_s)
            if facts.epoch is None:
                raise FedmeshError(Code.NOT_FOUND, f"nobody has published key epoch {epoch} of this roster")
            taken = await self._take(facts.epoch, roster)
            if taken.epoch != epoch:
                raise FedmeshError(Code.STATEMENT_INVALID, f"the registry gave epoch {taken.epoch} for {epoch}")
            return taken

    async def keep(self, looked: Callable[[], None] = lambda: None) -> None:
        """Look again and again, until cancelled. looked: called after every look, whatever came of it."""
        while True:
            wait_s = _SOON_S
            try:
                wait_s = await self.look()
            except FedmeshError as error:
                log.warning("epoch_not_kept", code=error.code.value, reason=error.message)
                wait_s = _SOON_S if error.retryable else _LOOK_S
            looked()
            await asyncio.sleep(wait_s)

    async def look(self) -> float:
        """Take the newest epoch, make the next one if it is due and this hospital's turn, destroy what is over.

        Returns the seconds after which to look again.
        """
        facts = await self._mesh.get_epoch("", 0, _PATIENCE_S)
        if not facts.roster_sha256:
            return _SOON_S
        roster = await self._rosters.get(facts.roster_sha256, _PATIENCE_S)
        if roster is not self._rosters.newest:
            raise FedmeshError(
                Code.STATEMENT_INVALID, "the registry's present roster is older than one it showed before"
            )
        if self._keys.hospital_id not in roster:
            return _LOOK_S
        if facts.epoch is not None:
            try:
                async with self._asking:
                    await self._take(facts.epoch, roster)
            except FedmeshError as error:
                if error.code is not Code.WRONG_STATE:
                    raise
                # Made while this hospital was suspended. Another one is due since it is not.
                log.info("epoch_without_us", reason=error.message)
        wait_s = await self._make_if_due(facts, roster) if facts.due else _LOOK_S
        self._retire()
        return wait_s

    async def _make_if_due(self, facts: EpochFacts, roster: Roster) -> float:
        turn = maker_order(roster, facts.due).index(self._keys.hospital_id)
        wait_s = turn * TURN_S - facts.due_for_s
        if wait_s > 0:
            return min(wait_s, _SOON_S if facts.epoch is None else _LOOK_S)
        _, signed = await self._worker.run(
            make_epoch, self._keys, roster, facts.due, without=facts.barred, public=facts.public_key
        )
        stands = await self._mesh.publish_epoch(signed, _PATIENCE_S)
        async with self._asking:
            taken = await self._take(stands, roster)
        log.info("epoch_published", epoch=taken.epoch, own=stands == signed)
        return _LOOK_S

    async def _take(self, signed: Signed, roster: Roster) -> EpochKeys:
        """Open and keep published keys; an epoch that is kept already stays as it is."""
        opened = await self._worker.run(open_epoch, signed, self._keys, roster)
        kept = self._stored(opened.roster, opened.epoch)
        if kept is None:
            self._store.save(opened)
            kept = self._known[opened.roster, opened.epoch] = opened
            log.info("epoch_taken", epoch=opened.epoch, maker=signed.hospital_id, fingerprint=opened.sha256[:16])
        elif kept.sha256 != opened.sha256:
            raise FedmeshError(
                Code.STATEMENT_INVALID, f"the registry shows two publications of epoch {opened.epoch}: the first stands"
            )
        return kept

    def _stored(self, roster_sha256: str, epoch: int) -> EpochKeys | None:
        key = (roster_sha256, epoch)
        if key not in self._known:
            loaded = self._store.load(*key)
            if loaded is None:
                return None
            self._known[key] = loaded
        return self._known[key]

    def _retire(self) -> None:
        kept = self._store.kept()
        used = self._in_use()
        now = self._clock.now()
        for old in kept:
            newer = [
                one
                for one in kept
                if self._order(one.roster_sha256, one.epoch) > self._order(old.roster_sha256, old.epoch)
            ]
            settled = any(now - one.since >= _RETIRE_AFTER for one in newer)
            if settled and (old.roster_sha256, old.epoch) not in used:
                self._store.retire(old.roster_sha256, old.epoch)
                self._known.pop((old.roster_sha256, old.epoch), None)
                log.info("group_key_destroyed", epoch=old.epoch)

    def _order(self, roster_sha256: str, epoch: int) -> tuple[int, int]:
        return self._rosters.version(roster_sha256), epoch
