"""Membership of the consortium."""

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.registry.domain.entities import Hospital, HospitalStatus
from services.registry.domain.events import event
from services.registry.domain.rules import require_status_change
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction


class HospitalUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

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

    async def set_status(
        self, command: Command[Hospital], hospital_id: str, status: HospitalStatus, reason: str
    ) -> bytes:
        """Suspend, reinstate or remove a hospital. It takes effect with the hospital's next call.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) for a removed hospital.
        """

        async def body(tx: Transaction) -> Hospital:
            hospital = (await tx.hospitals.get([hospital_id], lock=True)).get(hospital_id)
            if hospital is None:
                raise FedmeshError(Code.NOT_FOUND, f"hospital {hospital_id} is not registered")
            require_status_change(hospital, status)
            await tx.hospitals.set_status(hospital_id, status)
            told = event(
                "hospital.status_changed",
                self._clock.now(),
                command.caller,
                f"hospital/{hospital_id}",
                before=hospital.status.value,
                status=status.value,
                reason=reason,
            )
            await tx.outbox.add([told])
            return Hospital(hospital_id, hospital.display_name, status, hospital.created_at)

        return await self._mutations.run(command, body)

    async def list(self, caller: Identity) -> tuple[Hospital, ...]:
        return await self._store.run("ListHospitals", caller, lambda tx: tx.hospitals.list())
