"""Membership of the consortium: standing and strikes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.standing import Member
from services.registry.domain.entities import Hospital, HospitalStatus, Strike, StrikeRule
from services.registry.domain.events import event
from services.registry.domain.rules import require_status_change
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction


@dataclass(frozen=True)
class Struck:
    """What a strike led to. strikes: those that count now. barred: the hospital is suspended or removed."""

    strikes: int
    barred: bool


class HospitalUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock, rule: StrikeRule) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._rule = rule

    async def register(self, command: Command[Hospital], hospital_id: str, display_name: str) -> bytes:
        """Add a hospital, active at once.

        Raises: FedmeshError(ALREADY_EXISTS).
        """
        hospital = Hospital(hospital_id, display_name, HospitalStatus.ACTIVE, self._clock.now())

        async def body(tx: Transaction) -> Hospital:
            if not await tx.hospitals.add(hospital):
                raise FedmeshError(Code.ALREADY_EXISTS, f"hospital {hospital_id} is registered already")
            subject = f"hospital/{hospital_id}"
            told = event("hospital.registered", hospital.created_at, command.caller, subject, display_name=display_name)
            await tx.outbox.add([told])
            return hospital

        return await self._mutations.run(command, body)

    async def suspend(self, command: Command[Hospital], hospital_id: str, reason: str) -> bytes:
        """Suspend a hospital: one person may, for safety. The other changes of standing are `MembershipUseCases`'.

        The registry heeds it with the hospital's next call, the other services within seconds.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) for a removed hospital.
        """

        async def body(tx: Transaction) -> Hospital:
            hospital = await find_hospital(tx, hospital_id)
            return await change_standing(
                tx, command.caller, hospital, HospitalStatus.SUSPENDED, reason, self._clock.now()
            )

        return await self._mutations.run(command, body)

    async def record_strike(self, command: Command[Struck], make: Callable[[datetime], Strike]) -> bytes:
        """Note a strike; the one that reaches the limit suspends the hospital. A barred hospital stays so.

        make: the strike, given its time.

        Raises: FedmeshError(NOT_FOUND).
        """
        strike = make(self._clock.now())

        async def body(tx: Transaction) -> Struck:
            # Whoever strikes at the same time runs again and counts this one too.
            hospital = await find_hospital(tx, strike.hospital_id)
            await tx.hospitals.add_strike(strike)
            since = strike.at - timedelta(seconds=self._rule.window_s)
            strikes = await tx.hospitals.strikes(strike.hospital_id, since)
            suspending = hospital.status is HospitalStatus.ACTIVE and strikes >= self._rule.limit
            await self._tell(tx, command.caller, strike, strikes, suspending)
            return Struck(strikes, suspending or hospital.status is not HospitalStatus.ACTIVE)

        return await self._mutations.run(command, body)

    async def _tell(self, tx: Transaction, caller: Identity, strike: Strike, strikes: int, suspending: bool) -> None:
        subject = f"hospital/{strike.hospital_id}"
        job_id, round_number, attempt = strike.attempt or ("", 0, 0)
        where = {"job_id": str(job_id), "round": round_number, "attempt": attempt}
        facts = {"code": strike.code, "reason": strike.reason, "strikes": strikes}
        events = [event("hospital.strike", strike.at, caller, subject, **where, **facts)]
        if suspending:
            await tx.hospitals.set_status(strike.hospital_id, HospitalStatus.SUSPENDED, self._clock.now())
            limits = {"strikes": strikes, "limit": self._rule.limit, "window_s": self._rule.window_s}
            events.append(event("hospital.suspended", strike.at, caller, subject, **limits))
        await tx.outbox.add(events)

    async def members(self) -> Sequence[Member]:
        """All hospitals, for this process's own gate."""
        found = await self._store.ask("members", None, lambda tx: tx.hospitals.list(self._clock.now()))
        return [
            Member(
                item.hospital_id,
                "" if item.status is HospitalStatus.ACTIVE else item.status.value,
                item.certificates_from,
            )
            for item in found
        ]

    async def list(self, caller: Identity) -> tuple[Hospital, ...]:
        since = self._clock.now() - timedelta(seconds=self._rule.window_s)
        return await self._store.ask("ListHospitals", caller, lambda tx: tx.hospitals.list(since))


async def find_hospital(tx: Transaction, hospital_id: str) -> Hospital:
    """A hospital, locked; whoever changes something about it at the same time comes after, and sees what this one did.

    Raises: FedmeshError(NOT_FOUND).
    """
    hospital = (await tx.hospitals.get([hospital_id], lock=True)).get(hospital_id)
    if hospital is None:
        raise FedmeshError(
            Code.NOT_FOUND, f"hospital {hospital_id} is not registered: `fedmesh members register` adds it"
        )
    await tx.hospitals.touch([hospital_id])
    return hospital


async def change_standing(
    tx: Transaction, caller: Identity, hospital: Hospital, status: HospitalStatus, reason: str, at: datetime
) -> Hospital:
    """Change the standing of a hospital that is locked; strikes from before a reinstatement no longer count.

    Raises: FedmeshError(WRONG_STATE) for a removed hospital.
    """
    require_status_change(hospital, status)
    await tx.hospitals.set_status(hospital.hospital_id, status, at)
    if status is HospitalStatus.ACTIVE:
        await tx.hospitals.forgive(hospital.hospital_id, at)
    facts = {"before": hospital.status.value, "status": status.value, "reason": reason}
    subject = f"hospital/{hospital.hospital_id}"
    await tx.outbox.add([event("hospital.status_changed", at, caller, subject, **facts)])
    return replace(hospital, status=status)
