"""What every command needs to talk to a stack: stubs with an operator's certificate, the stack started if it sleeps."""

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
from services.common.config import PostgresConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from services.embedded.guard import Guard
from services.embedded.stack import Stack

ResultT = TypeVar("ResultT")

OPERATOR: Final = "operator"
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


@asynccontextmanager
async def stub(
    stack: Stack, service: str, tls: TlsConfig | None = None, operator: str = OPERATOR
) -> AsyncIterator[Any]:
    """A stub of one service, called as an operator who may have signed in, unless another certificate is given."""
    bearer = session.bearer_if_any if tls is None else None
    target = stack.target(_SERVED_BY.get(service, service))
    async with MeshChannel(target, tls or stack.operator(operator), bearer=bearer) as channel:
        yield channel.stub(_STUBS[service])


@contextmanager
def awake(folder: Path, services: Sequence[str]) -> Iterator[Stack]:
    """The stack in a folder with some services serving; what was asleep is started for the time of the block.

    Raises: FedmeshError(NOT_FOUND) when no stack was ever made there.
    """
    stack = Stack(folder)
    if not stack.exists():
        raise FedmeshError(
            Code.NOT_FOUND, f"there is no stack in {folder}: run `fedmesh demo` or `fedmesh up`, or name another --dir"
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
    folder: Path,
    service: str,
    question: Callable[[Any], Coroutine[Any, Any, ResultT]],
    needs: Sequence[str] = (),
    operator: str = OPERATOR,
) -> ResultT:
    """Run one question against one service of a stack, waking it if need be. operator: whose certificate calls."""

    async def go(stack: Stack) -> ResultT:
        async with stub(stack, service, operator=operator) as opened:
            return await question(opened)

    with awake(folder, needs or (service,)) as stack:
        return asyncio.run(go(stack))


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
