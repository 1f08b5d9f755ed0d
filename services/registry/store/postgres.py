"""Transactions on PostgreSQL, on behalf of a caller."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import psycopg

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.postgres import Connection, Database, Statement, Statements
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

# The SQLSTATE of `registry.enter`.
_NO_MEMBER: Final = "UM001"


class PostgresTransaction:
    """The nouns of one transaction."""

    def __init__(self, connection: Statements) -> None:
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
            return await body(PostgresTransaction(connection))

        with _members_only(caller):
            return await self._database.run_tx(name, scoped, opening=_enter(caller, whole=whole))

    async def ask(
        self, name: str, caller: Identity | None, body: Callable[[Transaction], Awaitable[T]], *, whole: bool = False
    ) -> T:
        """As `run`, for a body that makes exactly one statement, and one that reads: it takes one round trip."""
        with _members_only(caller):
            return await self._database.ask(
                name,
                lambda statements: body(PostgresTransaction(statements)),
                opening=_enter(caller, whole=whole),
            )


def enter(hospital: str) -> Statement:
    """Tells row-level security for whom a transaction runs, '' for the consortium, and ends that of a hospital that is
    no active member.
    """
    return "select registry.enter(%s)", (hospital,)


def _enter(caller: Identity | None, *, whole: bool) -> list[Statement]:
    """Whom a transaction runs for. `whole`: an active hospital then sees all."""
    hospital = caller.name if caller is not None and caller.kind is Kind.HOSPITAL else ""
    return [enter(name) for name in ((hospital, "") if hospital and whole else (hospital,))]


@contextmanager
def _members_only(caller: Identity | None) -> Iterator[None]:
    """Words what `registry.enter` refuses."""
    try:
        yield
    except psycopg.DatabaseError as error:
        if error.sqlstate != _NO_MEMBER or caller is None:
            raise
        status = error.diag.message_detail
        if not status:
            raise FedmeshError(
                Code.PERMISSION_DENIED, f"hospital {caller.name} is not registered in this consortium"
            ) from None
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"hospital {caller.name} is {status}: ask the consortium", status=status
        ) from None
