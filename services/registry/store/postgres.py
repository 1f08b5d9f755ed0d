"""Transactions on PostgreSQL, on behalf of a caller."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.postgres import Connection, Database
from services.registry.domain.entities import HospitalStatus
from services.registry.store.blobs import PostgresBlobs
from services.registry.store.credentials import PostgresCredentials
from services.registry.store.hospitals import PostgresHospitals
from services.registry.store.jobs import PostgresJobs
from services.registry.store.ledgers import PostgresLedgers
from services.registry.store.membership import PostgresMembershipChanges
from services.registry.store.outbox import PostgresOutbox
from services.registry.store.performance import PostgresPerformance
from services.registry.store.plans import PostgresPlans
from services.registry.store.promotions import PostgresPromotions
from services.registry.store.requests import PostgresRequests
from services.registry.store.rosters import PostgresRosters
from services.registry.store.rounds import PostgresRounds
from services.registry.store.survivors import PostgresSurvivors
from services.registry.usecases.ports import Transaction

T = TypeVar("T")


class PostgresTransaction:
    """The nouns of one transaction."""

    def __init__(self, connection: Connection) -> None:
        self.requests = PostgresRequests(connection)
        self.hospitals = PostgresHospitals(connection)
        self.credentials = PostgresCredentials(connection)
        self.membership = PostgresMembershipChanges(connection)
        self.plans = PostgresPlans(connection)
        self.rosters = PostgresRosters(connection)
        self.jobs = PostgresJobs(connection)
        self.survivors = PostgresSurvivors(connection)
        self.ledgers = PostgresLedgers(connection)
        self.rounds = PostgresRounds(connection)
        self.performance = PostgresPerformance(connection)
        self.blobs = PostgresBlobs(connection)
        self.promotions = PostgresPromotions(connection)
        self.outbox = PostgresOutbox(connection)


class PostgresStore:
    """Implements `services.registry.usecases.ports.Store`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(
        self, name: str, caller: Identity | None, body: Callable[[Transaction], Awaitable[T]], *, whole: bool = False
    ) -> T:
        """Run `body` seeing what the caller may see; None is the registry itself. `whole` as in `ports.Store`.

        Raises: FedmeshError(PERMISSION_DENIED) for a hospital that is not an active member, and as
            `Database.run_tx`.
        """

        async def scoped(connection: Connection) -> T:
            tx = PostgresTransaction(connection)
            await _enter(connection, caller)
            if caller is not None and caller.kind is Kind.HOSPITAL:
                await _require_active(tx, caller)
                if whole:
                    await _enter(connection, None)
            return await body(tx)

        return await self._database.run_tx(name, scoped)


async def _enter(connection: Connection, caller: Identity | None) -> None:
    """Tell row-level security for whom this transaction runs; PostgreSQL forgets it at the transaction's end."""
    hospital = caller is not None and caller.kind is Kind.HOSPITAL
    await connection.execute(
        "select set_config('app.hospital_id', %s, true), set_config('app.scope', %s, true)",
        (caller.name, "hospital") if hospital and caller is not None else ("", "consortium"),
    )


async def _require_active(tx: PostgresTransaction, caller: Identity) -> None:
    hospital = (await tx.hospitals.get([caller.name])).get(caller.name)
    if hospital is None:
        raise FedmeshError(Code.PERMISSION_DENIED, f"hospital {caller.name} is not registered in this consortium")
    if hospital.status is not HospitalStatus.ACTIVE:
        raise FedmeshError(
            Code.PERMISSION_DENIED,
            f"hospital {caller.name} is {hospital.status.value}: ask the consortium",
            status=hospital.status.value,
        )
