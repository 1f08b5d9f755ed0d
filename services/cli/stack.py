"""`fedmesh up`, `down`, `status`, `migrate`: a stack that stays."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from services.cli.centre import CentreFile, RemoteCentre, find_place
from services.common.config import PostgresConfig, load_config
from services.common.errors import Code, FedmeshError
from services.embedded.issuer import CLIENT_ID
from services.embedded.stack import ENROLMENT, ISSUER, Stack

DEMO_DIR: Final = Path(".fedmesh/demo")
UP_DIR: Final = Path(".fedmesh/up")
BASE_PORT: Final = 7100

Folder = Annotated[Path, typer.Option("--dir", help="The stack's folder")]
# Of commands that also talk to a centre elsewhere; None: whatever `find_place` finds.
DemoDir = Annotated[
    Path | None, typer.Option("--dir", help="Folder of a stack on this machine", show_default=str(DEMO_DIR))
]
UpDir = Annotated[
    Path | None, typer.Option("--dir", help="Folder of a stack on this machine", show_default=str(UP_DIR))
]


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(migrate)


def up(
    folder: Folder = UP_DIR,
    port: Annotated[int, typer.Option(min=1024, max=65000, help="First of six loopback ports")] = BASE_PORT,
    sign_in: Annotated[
        bool,
        typer.Option(
            "--sign-in", help="From now on people sign in, at an issuer on this machine that is for trying only"
        ),
    ] = False,
) -> None:
    """Start PostgreSQL, Redis and the four services, and leave them running. Harmless when they run."""
    console = Console()
    stack = Stack(folder, base_port=port)
    ran_before = stack.exists() and any(part.running for part in stack.status())
    with console.status("Starting PostgreSQL, Redis, audit, registry, aggregator, coordinator ..."):
        try:
            users = stack.require_sign_in() if sign_in else None
            stack.start()
        except BaseException:
            if not ran_before:
                stack.stop()
            raise
    _print(console, stack)
    console.print(f"Hospitals enrol at {stack.target(ENROLMENT)}: fedmesh members invite --help")
    if stack.signs_in:
        _say_how_to_sign_in(console, stack, users)
    console.print(f"Stop it with: fedmesh down --dir {folder}")


def _say_how_to_sign_in(console: Console, stack: Stack, users: Path | None) -> None:
    url = f"http://{stack.target(ISSUER)}"
    if users is not None:
        console.print(f"People sign in; who may is in {users}", soft_wrap=True)
    console.print(f"Sign in with: fedmesh login --issuer {url} --client-id {CLIENT_ID}", soft_wrap=True)
    console.print(
        f"Confirm in a browser, or: curl -d user_code=CODE -d user=alice {url}/device", soft_wrap=True, highlight=False
    )


def down(folder: Folder = UP_DIR) -> None:
    """Stop the stack in good order. Its data stays."""
    stack = _existing(folder)
    console = Console()
    with console.status("Stopping ..."):
        stack.stop()
    console.print(f"Stopped. The data stays in {folder}.")


def status(folder: UpDir = None, centre: CentreFile = None) -> None:
    """Say what runs and where it listens: of a stack its processes and logs, of a centre elsewhere its services.

    Exit code 3 when something is down.
    """
    from services.cli.reaching import print_services

    place = find_place(folder, centre, UP_DIR)
    well = print_services(place) if isinstance(place, RemoteCentre) else _print(Console(), _existing(place))
    if not well:
        raise typer.Exit(3)


def migrate(
    config: Annotated[Path, typer.Option(help="YAML file with `dsn` and `password_file` of the migrator role")],
    schema: Annotated[str, typer.Option(help="`registry` or `audit`")],
) -> None:
    """Bring one schema of a PostgreSQL up to date. Safe to run twice."""
    from services.audit.store import MIGRATIONS as AUDIT
    from services.common.migrations import migrate as apply
    from services.registry.store import MIGRATIONS as REGISTRY

    folders = {"registry": REGISTRY, "audit": AUDIT}
    if schema not in folders:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--schema {schema}: use registry or audit")
    applied = apply(load_config(PostgresConfig, config), schema, folders[schema])
    typer.echo(f"{schema}: applied {', '.join(applied)}" if applied else f"{schema}: up to date")


def _existing(folder: Path) -> Stack:
    stack = Stack(folder)
    if not stack.exists():
        raise FedmeshError(
            Code.NOT_FOUND,
            f"there is no stack in {folder}: run `fedmesh up`, name another --dir, or a centre elsewhere by --centre",
        )
    return stack


def _print(console: Console, stack: Stack) -> bool:
    table = Table()
    for column in ("part", "state", "pid", "address", "log"):
        table.add_column(column, overflow="fold")
    parts = stack.status()
    for part in parts:
        state = "[green]running[/green]" if part.running else "[red]stopped[/red]"
        table.add_row(part.name, state, str(part.pid or ""), part.address, str(part.log))
    console.print(table)
    return all(part.running for part in parts)
