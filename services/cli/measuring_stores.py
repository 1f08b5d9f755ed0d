"""`fedmesh bench audit` and `bench registry`: the services that store, under load."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.bench import BENCH_DIR
from services.common.files import require_writable


def register(app: typer.Typer) -> None:
    """Add the commands to `fedmesh bench`."""
    app.command("audit")(audit)


def audit(
    appenders: Annotated[int, typer.Option(min=1, max=80, help="Appends at a time, each over its own channel")] = 50,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Time of the measured appends")] = 20.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="For the run; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure appends to the audit log and the verification of proofs. Exit code 1 when a target is missed."""
    from services.bench.audit_log import AuditLogOptions, run_audit_log

    require_writable(report)
    measured = run_audit_log(AuditLogOptions(folder, appenders, seconds, report), Console())
    if not all(kept for _, _, kept in measured.targets().values()):
        raise typer.Exit(1)
