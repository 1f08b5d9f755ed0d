"""Checks what hospitals say before it is kept, so that one bad statement cannot make honest hospitals refuse a group.

What is checked against (adverts, sharers, survivors) is fixed once the attempt's phase has been reached; it is fetched
once a phase and kept. A report that cannot be judged, because its attempt or phase is not the present one, is not
taken: the store refuses it in words that fit, or knows it already.
"""

import asyncio
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import Code, FedmeshError
from services.coordinator.domain.attempt import Attempt, AttemptId, Seen
from services.coordinator.domain.stored import sealed_statement
from services.coordinator.ports import Rounds
from services.coordinator.rosters import Rosters
from services.coordinator.shelf import (
    Shelf,
    advert_field,
    confirmation_field,
    reveal_field,
    share_field,
    upload_field,
)
from services.coordinator.wire import attempt_ref, listed_uploads
from services.secure_sum import opening
from services.secure_sum.roster import Roster
from services.secure_sum.statements import Digest, Signed, open_signed

UNJUDGED: Final = "unjudged"
"""A guard that no phase has: the store refuses the report, or answers it again."""

_MOST_SCENES: Final = 256


@dataclass(frozen=True)
class Judged:
    """What may be kept of a report. marks: what no other hospital may use in the attempt. age: that an advert says."""

    statements: Mapping[str, bytes] = field(default_factory=dict)
    marks: Sequence[str] = ()
    age: int = 0


@dataclass(frozen=True)
class _Scene:
    attempt: Attempt
    roster: Roster
    shelf: Shelf


class Intake:
    """All methods return None for what cannot be judged here, and raise FedmeshError(STATEMENT_INVALID) for what no
    honest hospital sends; retryable errors while the store or the registry is away.
    """

    def __init__(self, store: Rounds, rosters: Rosters) -> None:
        self._store = store
        self._rosters = rosters
        self._scenes: OrderedDict[str, _Scene] = OrderedDict()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def advert(self, named: AttemptId, hospital_id: str, signed: Signed) -> Judged | None:
        scene = await self._scene(named, hospital_id, lambda _attempt: True)
        if scene is None:
            return None
        _require_own(signed, hospital_id)
        attempt = scene.attempt
        advert = opening.check_advert(signed, scene.roster, attempt_ref(named), attempt.epoch, attempt.oldest)
        opening.require_distinct([advert])
        marks = (advert.mask_key, advert.transport_key, advert.seed_commitment)
        return Judged({advert_field(hospital_id): sealed_statement(signed)}, marks, advert.age)

    async def shares(self, named: AttemptId, hospital_id: str, signed: Sequence[Signed]) -> Judged | None:
        return await self._of_the_present(named, lambda: self._shares(named, hospital_id, signed))

    async def _shares(self, named: AttemptId, hospital_id: str, signed: Sequence[Signed]) -> Judged | None:
        scene = await self._scene(named, hospital_id, lambda attempt: hospital_id in attempt.group)
        if scene is None:
            return None
        adverts = await scene.shelf.adverts(scene.attempt)
        dealt = opening.check_shares(signed, scene.roster, attempt_ref(named), adverts, hospital_id)
        return Judged(
            {
                share_field(hospital_id, share.recipient): sealed_statement(item)
                for share, item in zip(dealt, signed, strict=True)
            }
        )

    async def upload(self, named: AttemptId, hospital_id: str, signed: Signed, sha256: str) -> Judged | None:
        scene = await self._scene(named, hospital_id, lambda attempt: hospital_id in attempt.sharers)
        if scene is None:
            return None
        _require_own(signed, hospital_id)
        attempt = scene.attempt
        upload = opening.check_upload(signed, scene.roster, attempt_ref(named), attempt.adverts_sha256, attempt.sharers)
        if upload.ciphertext_sha256 != sha256:
            raise FedmeshError(Code.STATEMENT_INVALID, "the upload statement names another ciphertext than the report")
        # A survivor sends its upload again after a loss: under the statement that is on the list, or not at all.
        if attempt.survivors and listed_uploads(attempt).get(hospital_id) != signed.sha256:
            raise FedmeshError(Code.STATEMENT_INVALID, "the upload statement is not the one that was listed")
        return Judged({upload_field(hospital_id): sealed_statement(signed)})

    async def confirmation(
        self, named: AttemptId, hospital_id: str, survivors_sha256: str, signature: bytes
    ) -> Judged | None:
        scene = await self._survivor(named, hospital_id)
        if scene is None or scene.attempt.survivors_sha256 != survivors_sha256:
            return None
        survivors = scene.attempt.survivors.encode()
        opening.check_confirmation(survivors, scene.roster, hospital_id, signature)
        return Judged({confirmation_field(hospital_id): sealed_statement(Signed(hospital_id, b"", signature))})

    async def reveal(self, named: AttemptId, hospital_id: str, signed: Signed) -> Judged | None:
        return await self._of_the_present(named, lambda: self._reveal(named, hospital_id, signed))

    async def _reveal(self, named: AttemptId, hospital_id: str, signed: Signed) -> Judged | None:
        scene = await self._survivor(named, hospital_id)
        if scene is None:
            return None
        _require_own(signed, hospital_id)
        shares = await scene.shelf.shares_for(scene.attempt, hospital_id)
        opening.check_reveal(signed, scene.roster, scene.attempt.survivors.encode(), shares)
        return Judged({reveal_field(hospital_id): sealed_statement(signed)})

    async def digest(
        self, named: AttemptId, hospital_id: str, signed: Signed, sum_sha256: str, seen: Seen
    ) -> Judged | None:
        scene = await self._scene(
            named, hospital_id, lambda attempt: attempt.sum_sha256 == sum_sha256 and hospital_id in attempt.survivor_ids
        )
        if scene is None:
            return None
        _require_own(signed, hospital_id)
        digest = open_signed(Digest, signed, scene.roster)
        said = (digest.attempt, digest.survivors, digest.sum_sha256, digest.digest, digest.next_state_sha256)
        survivors = scene.attempt.survivors_sha256
        if said != (attempt_ref(named), survivors, sum_sha256, seen.digest, seen.next_state_sha256):
            raise FedmeshError(Code.STATEMENT_INVALID, "the digest statement says something else than the report")
        return Judged()

    async def _of_the_present(self, named: AttemptId, judge: Callable[[], Awaitable[Judged | None]]) -> Judged | None:
        """The attempt that is held here may be over, and its statements gone with it: then look at the present one."""
        try:
            return await judge()
        except FedmeshError as error:
            if error.code is not Code.LOST_RACE:
                raise
            self._scenes.pop(named.job_id, None)
            return await judge()

    async def _survivor(self, named: AttemptId, hospital_id: str) -> _Scene | None:
        return await self._scene(named, hospital_id, lambda attempt: hospital_id in attempt.survivor_ids)

    async def _scene(self, named: AttemptId, hospital_id: str, reached: Callable[[Attempt], bool]) -> _Scene | None:
        """The attempt, when it is the present one, has the hospital in it and has come as far as it takes."""

        def fits(attempt: Attempt) -> bool:
            return attempt.id == named and reached(attempt) and hospital_id in attempt.cohort

        held = self._scenes.get(named.job_id)
        if held is not None and fits(held.attempt):
            return held
        async with self._locks[named.job_id]:
            held = self._scenes.get(named.job_id)
            if held is None or not fits(held.attempt):
                held = await self._fetch(named.job_id)
        return held if held is not None and fits(held.attempt) else None

    async def _fetch(self, job_id: str) -> _Scene | None:
        attempt = await self._store.attempt(job_id)
        if attempt is None:
            return None
        roster = await self._rosters.get(attempt.roster_sha256)
        before = self._scenes.get(job_id)
        shelf = before.shelf if before is not None and before.attempt.id == attempt.id else Shelf(self._store)
        self._scenes[job_id] = scene = _Scene(attempt, roster, shelf)
        self._scenes.move_to_end(job_id)
        while len(self._scenes) > _MOST_SCENES:
            forgotten, _ = self._scenes.popitem(last=False)
            self._locks.pop(forgotten, None)
        return scene


def shares_value(signed: Sequence[Signed]) -> str:
    """What names a set of shares."""
    return hashlib.sha256(b"".join(item.signature + item.statement for item in signed)).hexdigest()


def _require_own(signed: Signed, hospital_id: str) -> None:
    if signed.hospital_id != hospital_id:
        raise FedmeshError(Code.STATEMENT_INVALID, "the statement is another hospital's")
