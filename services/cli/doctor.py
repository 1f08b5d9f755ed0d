"""`fedmesh doctor`: is everything in order, and if not, what is to be done."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.centre import CentreFile, RemoteCentre, find_place
from services.cli.findings import Level, as_json, print_findings
from services.cli.stack import UP_DIR, UpDir
from services.common.errors import Code, FedmeshError
from services.embedded.stack import Stack


def register(app: typer.Typer) -> None:
    """Add the command to the main command."""
    app.command()(doctor)


def doctor(
    folder: UpDir = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of one service or hospital node, looked at from its machine")
    ] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
    centre: CentreFile = None,
) -> None:
    """Check certificates, clocks, stores, versions, reachability, audit and ledgers, and say what to do.

    Exit code 1 when something failed; a warning changes nothing. Nothing is started or changed.
    """
    from services.cli.checkup import check_process
    from services.cli.checkup_stack import check_remote, check_stack

    if config is not None and (folder is not None or centre is not None):
        raise FedmeshError(Code.INVALID_ARGUMENT, "--dir, --centre and --config exclude each other")
    if config is not None:
        found = asyncio.run(check_process(config))
    elif isinstance(place := find_place(folder, centre, UP_DIR), RemoteCentre):
        found = asyncio.run(check_remote(place))
    else:
        stack = Stack(place)
        if not stack.exists():
            raise FedmeshError(
                Code.NOT_FOUND, f"there is no stack in {stack.folder}: name a --dir, a --centre or a --config"
            )
        found = asyncio.run(check_stack(stack))
    if as_text:
        typer.echo(json.dumps(as_json(found), indent=2))
    else:
        print_findings(Console(), found)
    if any(item.level is Level.FAIL for item in found):
        raise typer.Exit(1)
