"""`fedmesh bench hospital` and `bench training`: one hospital by itself, and training without a stack."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.bench import BENCH_DIR
from services.common.files import require_writable


def register(app: typer.Typer) -> None:
    """Add the commands to `fedmesh bench`."""
    app.command("hospital")(hospital)
    app.command("training")(training)


def hospital(
    patients: Annotated[
        int, typer.Option(min=1, max=5_000_000, help="Patients of the synthetic hospital; 10 million at 15 by default")
    ] = 667_000,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="For temporary files and compiled plans")] = BENCH_DIR,
) -> None:
    """Measure one large hospital, from Parquet to its first clipped, noised, masked and encrypted contribution.

    Its synthetic data is made in a temporary folder and removed afterwards. Exit code 1 beyond 2 GiB of memory.
    """
    from services.bench.large_hospital import LargeOptions, run_large_hospital

    require_writable(report)
    if not run_large_hospital(LargeOptions(folder, patients, report), Console()).within_memory:
        raise typer.Exit(1)


def training(
    plan: Annotated[str, typer.Option(help="Plan in YAML, or the name of a shipped plan")] = "readmission-logistic",
    data: Annotated[
        Path | None, typer.Option(help="Folder with diabetes-130 files; a synthetic cohort without it")
    ] = None,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospitals of the synthetic cohort")] = 15,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="For the synthetic cohort and compiled plans")] = BENCH_DIR,
) -> None:
    """Measure training: the critical path of one hospital against training on the pooled data on the same core."""
    from services.bench.training import TrainingOptions, run_training

    require_writable(report)
    run_training(TrainingOptions(folder, plan, data, hospitals, report), Console())
