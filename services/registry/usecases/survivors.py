"""Confirmed survivors: stored before any mask is opened, so that a round is opened for one list only."""

import hashlib
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.registry.domain.entities import Event, SurvivorList
from services.registry.domain.events import event
from services.registry.domain.rules import (
    check_survivors,
    require_newest_attempt,
    require_next_version,
    require_roster,
    require_running,
)
from services.registry.usecases.jobs import find_job
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction
from services.secure_sum.statements import Survivors


class SurvivorUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

    async def store(self, command: Command[None], make: Callable[[datetime], SurvivorList]) -> bytes:
        """Store the survivors of a job's open attempt; the first list of a round stands.

        make: the list, given the time of its storing. The same list again is harmless.

        Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) for another list than the stored one, an ended job, another round
            or an older attempt; as `check_survivors`.
        """
        told = make(self._clock.now())

        async def body(tx: Transaction) -> None:
            job = await find_job(tx, told.job_id, lock=True)
            standing = await tx.survivors.get(told.job_id, told.round)
            if standing is not None:
                _require_same(told, standing)
                return
            require_running(job)
            require_next_version(job, told.round, "round")
            attempt, epoch = await tx.jobs.newest_attempt(told.job_id, told.round)
            require_newest_attempt(told.attempt, attempt)
            published = await tx.rosters.get(require_roster(job))
            assert published is not None, "a foreign key holds the roster"
            said = check_survivors(told, job, published.roster, epoch)
            await tx.jobs.touch(told.job_id)
            await tx.survivors.add(told)
            await tx.outbox.add([_stored(told, said, command.caller)])

        try:
            return await self._mutations.run(command, body)
        except FedmeshError as error:
            if error.code in (Code.STATEMENT_INVALID, Code.WRONG_STATE):
                await self._mutations.note_refusal(command, f"job/{told.job_id}", error)
            raise

    async def get(self, caller: Identity, job_id: UUID) -> SurvivorList | None:
        """The survivors of the job's next round, if they are stored, with the coordinator's record.

        Raises: FedmeshError(NOT_FOUND).
        """

        async def body(tx: Transaction) -> SurvivorList | None:
            job = await find_job(tx, job_id)
            return await tx.survivors.get(job_id, job.version + 1, details=True)

        return await self._store.run("GetSurvivors", caller, body)


def _require_same(told: SurvivorList, standing: SurvivorList) -> None:
    if (told.attempt, told.statement) != (standing.attempt, standing.statement):
        raise FedmeshError(
            Code.WRONG_STATE,
            f"round {told.round} has other survivors stored, of attempt {standing.attempt}: complete or burn that one",
            attempt=standing.attempt,
        )


def _stored(told: SurvivorList, said: Survivors, caller: Identity) -> Event:
    return event(
        "survivors.stored",
        told.stored_at,
        caller,
        f"job/{told.job_id}",
        round=told.round,
        attempt=told.attempt,
        roster_sha256=said.roster,
        epoch=said.epoch,
        survivors_sha256=hashlib.sha256(told.statement).hexdigest(),
        survivors=list(said.ids),
        dropped=list(said.dropped),
        confirmed_by=sorted(told.confirmations),
    )
