"""`fedmesh bench`: benchmarks of the whole system on this machine."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from services.common.errors import Code, FedmeshError

BENCH_DIR: Final = Path(".fedmesh/bench")

app = typer.Typer(help="Benchmarks on this machine; compare figures of one run only.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Benchmarks on this machine."""


@app.command("secure-sum")
def secure_sum(
    params: Annotated[int, typer.Option(min=1, max=1 << 25, help="Integers that each hospital sends")] = 100_000,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospital processes")] = 15,
    lanes: Annotated[int, typer.Option(min=1, max=2, help="2: 20-bit values; 1: 40-bit values")] = 2,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Measured rounds, after one that warms up")] = 5,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the run lives; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure rounds of the secure sum: 15 hospital processes, four services, mutual TLS. Exit code 1 if not exact."""
    from services.bench.secure_sum import BenchOptions, run_secure_sum

    if report is not None and not report.absolute().parent.is_dir():
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {report}: no such folder")
    result = run_secure_sum(BenchOptions(folder, params, hospitals, lanes, rounds, report), Console())
    if not result.exact:
        raise typer.Exit(1)
