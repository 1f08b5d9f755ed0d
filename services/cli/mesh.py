"""What every command needs to talk to a centre: stubs with an operator's certificate, a stack started if it sleeps."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from fedmesh.audit.v1 import audit_pb2_grpc
from fedmesh.coordinator.v1 import coordinator_pb2_grpc
from fedmesh.registry.v1 import (
    budget_pb2_grpc,
    enrolment_pb2_grpc,
    membership_pb2_grpc,
    performance_pb2_grpc,
    registry_pb2_grpc,
)

from services.cli import session
from services.cli.centre import OPERATOR, Centre, Place, RemoteCentre
from services.common.config import PostgresConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from services.common.grpc.server import MAX_MESSAGE_BYTES
from services.embedded.guard import Guard
from services.embedded.stack import Stack

ResultT = TypeVar("ResultT")

# For a service that has just started and does not know yet which hospitals to let in, or that fails over.
PATIENCE_S: Final = 20.0
# A stub by the name of its service, and the process that serves it.
_SERVED_BY: Final = dict.fromkeys(("budgets", "credentials", "membership", "performance"), "registry")
_STUBS: Final = {
    "budgets": budget_pb2_grpc.BudgetServiceStub,
    "credentials": enrolment_pb2_grpc.CredentialServiceStub,
    "membership": membership_pb2_grpc.MembershipServiceStub,
    "performance": performance_pb2_grpc.PerformanceServiceStub,
    "registry": registry_pb2_grpc.RegistryServiceStub,
    "coordinator": coordinator_pb2_grpc.CoordinatorServiceStub,
    "audit": audit_pb2_grpc.AuditServiceStub,
}


def connect(
    centre: Centre,
    service: str,
    *,
    tls: TlsConfig | None = None,
    operator: str = OPERATOR,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> MeshChannel:
    """A channel to one service, as an operator who may have signed in, unless another certificate is given."""
    process = _SERVED_BY.get(service, service)
    remote = centre if isinstance(centre, RemoteCentre) else None
    bearer = remote.bearer if remote else session.bearer_if_any
    return MeshChannel(
        centre.target(process),
        tls or centre.operator(operator),
        max_message_bytes=max_message_bytes,
        bearer=bearer if tls is None else None,
        server_name=remote.server_name(process) if remote else None,
    )


@asynccontextmanager
async def stub(
    centre: Centre, service: str, tls: TlsConfig | None = None, operator: str = OPERATOR
) -> AsyncIterator[Any]:
    """A stub of one service, called as `connect` says."""
    async with connect(centre, service, tls=tls, operator=operator) as channel:
        yield channel.stub(_STUBS[service])


@contextmanager
def reach(place: Place, services: Sequence[str]) -> Iterator[Centre]:
    """The centre at a place with some services serving: a stack that sleeps is woken, as by `awake`.

    Raises: FedmeshError as `awake`; what cannot be reached elsewhere with a word on how to find out why.
    """
    if isinstance(place, RemoteCentre):
        with _told_where(place):
            yield place
        return
    with awake(place, services) as stack:
        yield stack


@contextmanager
def awake(folder: Path, services: Sequence[str]) -> Iterator[Stack]:
    """The stack in a folder with some services serving; what was asleep is started for the time of the block.

    Raises: FedmeshError(NOT_FOUND) when no stack was ever made there.
    """
    stack = Stack(folder)
    if not stack.exists():
        raise FedmeshError(
            Code.NOT_FOUND,
            f"there is no stack in {folder}: run `fedmesh demo` or `fedmesh up`, name another --dir, or name a centre "
            "elsewhere by --centre",
        )
    running = {part.name for part in stack.status() if part.running}
    if set(services) <= running:
        yield stack
        return
    if running:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the stack in {folder} runs without {', '.join(sorted(set(services) - running))}: "
            "see `fedmesh status`, then `fedmesh up`",
        )
    guard = Guard()
    borrowed = Stack(folder, guard=guard)
    try:
        borrowed.start(services)
        yield borrowed
    finally:
        borrowed.stop()
        guard.close()


@contextmanager
def _told_where(centre: RemoteCentre) -> Iterator[None]:
    """What cannot be reached elsewhere is the network's matter more often than the service's: say how to find out."""
    try:
        yield
    except FedmeshError as error:
        if error.code not in (Code.SERVICE_UNAVAILABLE, Code.DEADLINE_EXCEEDED):
            raise
        raise FedmeshError(
            error.code,
            f"{error.message}; `fedmesh doctor --centre {centre.file}` says which service cannot be reached",
            **error.detail,
        ) from error


@contextmanager
def database_of(folder: Path) -> Iterator[tuple[Stack, PostgresConfig]]:
    """The stack in a folder and the audit service's database, started for the time of the block if need be.

    Raises: FedmeshError(NOT_FOUND) when no stack was ever made there.
    """
    guard = Guard()
    stack = Stack(folder, guard=guard)
    if not stack.exists():
        raise FedmeshError(Code.NOT_FOUND, f"there is no stack in {folder}: name another --dir")
    asleep = not stack.postgres.status().running
    try:
        if asleep:
            stack.postgres.start()
        yield stack, stack.postgres.config("audit_service")
    finally:
        if asleep:
            stack.postgres.stop()
        guard.close()


def ask(
    place: Place,
    service: str,
    question: Callable[[Any], Coroutine[Any, Any, ResultT]],
    needs: Sequence[str] = (),
    operator: str = OPERATOR,
) -> ResultT:
    """Run one question against one service, waking a stack if need be. operator: whose certificate calls."""

    async def go(centre: Centre) -> ResultT:
        async with stub(centre, service, operator=operator) as opened:
            return await question(opened)

    with reach(place, needs or (service,)) as centre:
        return asyncio.run(go(centre))


async def or_why(question: Coroutine[Any, Any, ResultT]) -> tuple[ResultT | None, str]:
    """An answer; or None and why, when its service is away or it is for people with another role.

    Raises: FedmeshError for anything else.
    """
    try:
        return await question, ""
    except FedmeshError as error:
        if not error.retryable and error.code is not Code.PERMISSION_DENIED:
            raise
        return None, error.message
