"""Rosters, and the key epochs of their members. What counts is who signed; who brings it does not matter."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, require_hospital
from services.registry.domain.entities import (
    EpochStanding,
    Event,
    Hospital,
    HospitalStatus,
    JobStatus,
    KeyEpoch,
    MemberStanding,
    PublishedRoster,
)
from services.registry.domain.events import event
from services.registry.domain.rules import (
    due_epoch,
    require_fit_members,
    require_following,
    require_sealed_to_active,
    require_wanted_public_key,
)
from services.registry.usecases.jobs import end_job
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction
from services.secure_sum.opening import check_epoch
from services.secure_sum.parameters import public_key_sets
from services.secure_sum.roster import Roster, as_roster
from services.secure_sum.statements import EpochStatement, Signed, parse


class RosterUseCases:
    """max_age: after which a key epoch of the present roster is due to be followed by another."""

    def __init__(self, store: Store, mutations: Mutations, clock: Clock, max_age: timedelta) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._max_age = max_age

    async def publish(self, command: Command[PublishedRoster], statement: bytes, signatures: dict[str, bytes]) -> bytes:
        """Make a roster the present one; one that is stored already is given back as it is.

        Members that the present roster has and the new one has not are removed. Running jobs end whose keys one of them
        has, or whoever had the keys of a member that has new ones now.

        Raises: FedmeshError(STATEMENT_INVALID) for a roster that is not in order or not signed as it must be,
            (WRONG_STATE) for a fork or a removed member, (NOT_FOUND) for members that are not registered.
        """
        told = as_roster(statement)

        async def body(tx: Transaction) -> PublishedRoster:
            known = await tx.rosters.get(told.sha256)
            if known is not None:
                return known
            present = await tx.rosters.present()
            _require_no_fork(told, present)
            roster = require_following(present, statement, signatures)
            registered = await tx.hospitals.get(roster.ids, lock=True)
            require_fit_members(roster, command.caller.consortium, registered)
            now = self._clock.now()
            published = PublishedRoster(roster, statement, signatures, str(command.caller), now)
            await tx.rosters.add(published)
            await tx.outbox.add([_published(published, command.caller, now)])
            if present is not None:
                # Touched, so that a job that is being created beside this comes before it or knows of it.
                await tx.hospitals.touch(roster.ids)
                await _end_old_keys(tx, command.caller, present.roster, roster, now)
            return published

        try:
            return await self._mutations.run(command, body, whole=True)
        except FedmeshError as error:
            if error.code in (Code.STATEMENT_INVALID, Code.WRONG_STATE):
                await self._mutations.note_refusal(command, f"roster/{told.sha256}", error)
            raise

    async def list(self, caller: Identity, after: int) -> tuple[PublishedRoster, ...]:
        return await self._store.ask("ListRosters", caller, lambda tx: tx.rosters.after(after))

    async def publish_epoch(self, command: Command[KeyEpoch], signed: Signed) -> bytes:
        """Store the keys of the due epoch of the present roster. The first publication of a number stands.

        Raises: FedmeshError(PERMISSION_DENIED) for another hospital's statement, (STATEMENT_INVALID), (NOT_FOUND) for
            an unknown roster, (WRONG_STATE) for a roster that is not the present one or a number that is not due.
        """
        require_hospital(command.caller, signed.hospital_id)
        said = parse(EpochStatement, signed.statement)

        async def body(tx: Transaction) -> KeyEpoch:
            named = await tx.rosters.get(said.roster)
            if named is None:
                raise FedmeshError(Code.NOT_FOUND, f"there is no roster {said.roster}: publish it first")
            check_epoch(signed, named.roster)
            standing = await tx.rosters.epoch(said.roster, said.epoch)
            if standing is not None:
                return standing
            members = await _members(tx, named.roster, lock=True)
            now = self._clock.now()
            await self._require_due(tx, named, said, members, now)
            require_sealed_to_active(said, _barred(members), named.roster)
            require_wanted_public_key(said, await tx.plans.first_of(public_key_sets()))
            made = KeyEpoch(said.roster, said.epoch, signed, now)
            await tx.rosters.add_epoch(made)
            facts = {"roster_sha256": said.roster, "epoch": said.epoch, "key_sha256": said.key_sha256}
            subject = f"roster/{said.roster}"
            await tx.outbox.add([event("epoch.published", now, command.caller, subject, **facts, maker=said.maker)])
            return made

        # Whole: it concerns all members.
        return await self._mutations.run(command, body, whole=True)

    async def _require_due(
        self,
        tx: Transaction,
        named: PublishedRoster,
        said: EpochStatement,
        members: Sequence[Hospital],
        now: datetime,
    ) -> None:
        present = await tx.rosters.present()
        if present is None or present.roster.sha256 != named.roster.sha256:
            raise FedmeshError(Code.WRONG_STATE, "the epoch is of an older roster: make one for the present roster")
        newest, public_since = await tx.rosters.epoch(said.roster, None), await tx.plans.first_of(public_key_sets())
        due, _ = due_epoch(named.published_at, newest, members, self._max_age, now, public_since)
        if said.epoch != due:
            wanted = f"the one that is due is {due}" if due else "none is due: use the newest"
            raise FedmeshError(Code.WRONG_STATE, f"key epoch {said.epoch} is not to be made now: {wanted}", due=due)

    async def epoch(self, caller: Identity, roster_sha256: str, number: int) -> EpochStanding:
        """A key epoch (newest when 0) of a roster (present when empty), and what is due in the present one.

        Raises: FedmeshError(NOT_FOUND) for an unknown roster.
        """

        records = await self._store.ask(
            "GetEpoch",
            caller,
            lambda tx: tx.rosters.epoch_records(roster_sha256, number, public_key_sets()),
            whole=True,
        )
        if roster_sha256 and (records is None or not records.roster_known):
            raise FedmeshError(Code.NOT_FOUND, f"there is no roster {roster_sha256}")
        if records is None:
            return EpochStanding(None, 0, 0.0, "")
        due, late = due_epoch(
            records.roster_published_at,
            records.newest,
            records.members,
            self._max_age,
            self._clock.now(),
            records.public_since,
        )
        return EpochStanding(
            records.found,
            due,
            late.total_seconds(),
            records.roster_sha256,
            _barred(records.members),
            public_key=records.public_since is not None,
        )


async def _members(tx: Transaction, roster: Roster, *, lock: bool = False) -> tuple[Hospital, ...]:
    """The members as they are registered. `lock`: their standing stays until the transaction ends."""
    return tuple((await tx.hospitals.get(roster.ids, lock=lock)).values())


def _barred(members: Iterable[Hospital | MemberStanding]) -> tuple[str, ...]:
    return tuple(item.hospital_id for item in members if item.status is not HospitalStatus.ACTIVE)


def _require_no_fork(told: Roster, present: PublishedRoster | None) -> None:
    if present is None or told.statement.version > present.roster.statement.version:
        return
    raise FedmeshError(
        Code.WRONG_STATE,
        f"another roster of version {told.statement.version} stands; the present one is version"
        f" {present.roster.statement.version}: compare it with the other hospitals before you sign again",
        present=present.roster.sha256,
    )


async def _end_old_keys(tx: Transaction, caller: Identity, before: Roster, roster: Roster, now: datetime) -> None:
    """Remove members that are in the roster no longer, and end the jobs whose keys are open to old member keys.

    A job is bound to its roster, and all members of that have its group key, those outside the job's cohort too.
    """
    gone = [member.hospital_id for member in before.statement.members if member not in roster.statement.members]
    if not gone:
        return
    reason = f"roster version {roster.statement.version} no longer has {', '.join(gone)} with the keys of before"[:500]
    dropped = [name for name in gone if name not in roster]
    for hospital in (await tx.hospitals.get(dropped, lock=True)).values():
        if hospital.status is HospitalStatus.REMOVED:
            continue
        await tx.hospitals.set_status(hospital.hospital_id, HospitalStatus.REMOVED, now)
        facts = {"before": hospital.status.value, "status": HospitalStatus.REMOVED.value, "reason": reason}
        subject = f"hospital/{hospital.hospital_id}"
        await tx.outbox.add([event("hospital.status_changed", now, caller, subject, **facts)])
    for job in await tx.jobs.running_with(gone):
        await end_job(tx, job, caller, JobStatus.FAILED, f"{reason}: start a new job"[:500], now)


def _published(published: PublishedRoster, caller: Identity, now: datetime) -> Event:
    roster = published.roster
    return event(
        "roster.published",
        now,
        caller,
        f"roster/{roster.sha256}",
        version=roster.statement.version,
        previous=roster.statement.previous,
        members=list(roster.ids),
        signed_by=sorted(published.signatures),
        statement=published.statement.decode("ascii"),
    )
