"""`fedmesh doctor`: is everything in order, and if not, what is to be done."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.findings import Level, as_json, print_findings
from services.cli.inspection import stack_dir
from services.cli.stack import UP_DIR
from services.common.errors import Code, FedmeshError
from services.embedded.stack import Stack


def register(app: typer.Typer) -> None:
    """Add the command to the main command."""
    app.command()(doctor)


def doctor(
    folder: Annotated[Path | None, typer.Option("--dir", help=f"A stack's folder; {UP_DIR} by default")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of one service or hospital node, looked at from its machine")
    ] = None,
    as_text: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Check certificates, clocks, stores, versions, reachability, audit and ledgers, and say what to do.

    Exit code 1 when something failed; a warning changes nothing. Nothing is started or changed.
    """
    from services.cli.checkup import check_process
    from services.cli.checkup_stack import check_stack

    if folder is not None and config is not None:
        raise FedmeshError(Code.INVALID_ARGUMENT, "--dir and --config exclude each other")
    if config is not None:
        found = asyncio.run(check_process(config))
    else:
        stack = Stack(stack_dir(folder or UP_DIR))
        if not stack.exists():
            raise FedmeshError(Code.NOT_FOUND, f"there is no stack in {stack.folder}: name a --dir or a --config")
        found = asyncio.run(check_stack(stack))
    if as_text:
        typer.echo(json.dumps(as_json(found), indent=2))
    else:
        print_findings(Console(), found)
    if any(item.level is Level.FAIL for item in found):
        raise typer.Exit(1)
