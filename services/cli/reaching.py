"""`fedmesh status` of a centre elsewhere: which services answer an operator, and why one does not."""

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.markup import escape

from services.cli.centre import RemoteCentre
from services.cli.mesh import connect
from services.cli.tables import make_table
from services.common.errors import FedmeshError
from services.common.grpc.client import call
from services.common.tls import load_tls
from services.embedded.stack import SERVICES

_TIMEOUT_S = 5.0


def print_services(centre: RemoteCentre) -> bool:
    """Print a table of the services, and as whom they were asked. Returns whether all of them serve.

    Raises: FedmeshError(CONFIG_INVALID) for an operator's certificate that cannot be used.
    """
    identity = load_tls(centre.operator()).identity
    seen = asyncio.run(_ask(centre))
    table = make_table("part", "state", "address", "why")
    for service, why in seen.items():
        state = "[red]not serving[/red]" if why else "[green]serving[/green]"
        table.add_row(service, state, centre.target(service), escape(why))
    console = Console()
    console.print(table)
    console.print(f"asked as {identity}, by {centre.file}", highlight=False, soft_wrap=True)
    return not any(seen.values())


async def _ask(centre: RemoteCentre) -> dict[str, str]:
    """By service why it does not serve; nothing when it does."""
    answers = await asyncio.gather(*(_why_not(centre, service) for service in SERVICES))
    return dict(zip(SERVICES, answers, strict=True))


async def _why_not(centre: RemoteCentre, service: str) -> str:
    try:
        async with connect(centre, service) as channel:
            stub = channel.stub(health_pb2_grpc.HealthStub)
            answer = await call(stub.Check, health_pb2.HealthCheckRequest(), timeout_s=_TIMEOUT_S)
    except FedmeshError as error:
        return error.message
    serves = answer.status == health_pb2.HealthCheckResponse.SERVING
    return "" if serves else "it answers that it does not serve: see its log"
