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
    app.command("registry")(registry)


def audit(
    appenders: Annotated[int, typer.Option(min=1, max=80, help="Appends at a time, each over its own channel")] = 50,
    events: Annotated[int, typer.Option(min=1, max=500, help="Events of a call, where it is not one")] = 20,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Time of each of eight measures")] = 20.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="For the run; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure appends to the audit log and the verification of proofs. Exit code 1 when a target is missed."""
    from services.bench.audit_log import AuditLogOptions, run_audit_log

    require_writable(report)
    measured = run_audit_log(AuditLogOptions(folder, appenders, events, seconds, report), Console())
    if not all(kept for _, _, kept in measured.targets().values()):
        raise typer.Exit(1)


def registry(
    versions: Annotated[int, typer.Option(min=10_000, max=10_000_000, help="Generated model versions")] = 100_000,
    metrics: Annotated[int, typer.Option(min=10_000, max=200_000_000, help="Generated measurements")] = 1_000_000,
    rate: Annotated[float, typer.Option(min=1, max=1000, help="Reads a second, sent when they are due")] = 100.0,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Time of the measured reads")] = 20.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="For the run; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure reads from a full registry: a version, pages, numbers. Exit code 1 when a target is missed."""
    from services.bench.registry_load import RegistryOptions, run_registry

    require_writable(report)
    measured = run_registry(RegistryOptions(folder, versions, metrics, rate, seconds, report), Console())
    if not all(kept for _, _, kept in measured.targets().values()):
        raise typer.Exit(1)
