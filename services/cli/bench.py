"""`fedmesh bench`: benchmarks of the whole system on this machine."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from services.common.files import require_writable
from services.secure_sum.parameters import DEFAULT

BENCH_DIR: Final = Path(".fedmesh/bench")

app = typer.Typer(help="Benchmarks on this machine; compare figures of one run only.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Benchmarks on this machine."""


@app.command("secure-sum")
def secure_sum(
    params: Annotated[int, typer.Option(min=1, max=1 << 25, help="Integers that each hospital sends")] = 100_000,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospital processes")] = 15,
    lanes: Annotated[int, typer.Option(min=1, max=2, help="2: values of half a plaintext's bits; 1: of all")] = 2,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Measured rounds, after one that warms up")] = 5,
    parameters: Annotated[str, typer.Option(help="Parameter set, as a plan's encoding names it")] = DEFAULT.name,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the run lives; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure rounds of the secure sum: 15 hospital processes, four services, mutual TLS. Exit code 1 if not exact."""
    from services.bench.secure_sum import BenchOptions, run_secure_sum

    require_writable(report)
    result = run_secure_sum(BenchOptions(folder, params, hospitals, lanes, rounds, report, parameters), Console())
    if not result.exact:
        raise typer.Exit(1)


@app.command("asynchronous")
def asynchronous(
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospital processes; the last one is the slow one")] = 6,
    rounds: Annotated[int, typer.Option(min=4, max=1000, help="Rounds of an asynchronous job")] = 10,
    train_s: Annotated[float, typer.Option(min=0.01, max=60, help="Seconds that a fast hospital trains")] = 1.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the run lives; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure by how much a hospital that trains ten times as long slows the others. Exit code 1 if not exact."""
    from services.bench.asynchronous import AsynchronousOptions, run_asynchronous

    require_writable(report)
    options = AsynchronousOptions(folder, hospitals, rounds, train_s, report=report)
    if not run_asynchronous(options, Console()).exact:
        raise typer.Exit(1)


@app.command("jobs")
def jobs(
    jobs: Annotated[int, typer.Option(min=1, max=10_000, help="Measured jobs, after one that warms up")] = 24,
    concurrent: Annotated[int, typer.Option(min=1, max=64, help="Jobs that run at a time")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of each job")] = 10,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospital processes")] = 15,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the run lives; replaced by the next")] = BENCH_DIR,
) -> None:
    """Measure how many small private jobs a stack finishes in an hour: light training, everything else real."""
    from services.bench.jobs import JobsOptions, run_jobs

    require_writable(report)
    run_jobs(JobsOptions(folder, jobs, concurrent, rounds, hospitals, report), Console())


@app.command("privacy-audit")
def privacy_audit(
    runs: Annotated[int, typer.Option(min=2000, max=1_000_000, help="Attacked releases in each world")] = 6000,
    independent: Annotated[
        bool, typer.Option("--independent", help="Fresh noise in each world; 25000 runs are needed then")
    ] = False,
    confidence: Annotated[float, typer.Option(help="Confidence of the bound, between 0 and 1")] = 0.95,
    noise_factor: Annotated[float, typer.Option(help="Multiply the honest noise by this; 0.5 must be found out")] = 1.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
) -> None:
    """Attack the noise of the hospitals and bound the true epsilon from below. Exit code 1 if it exceeds the claim.

    There is no seed: the noise comes from the operating system, as in a hospital.
    """
    from services.bench.privacy_audit import AuditOptions, run_privacy_audit

    require_writable(report)
    options = AuditOptions(runs, not independent, confidence, noise_factor, report)
    if not run_privacy_audit(options, Console()).holds:
        raise typer.Exit(1)


@app.command("families")
def families(
    data: Annotated[Path, typer.Option(help="Folder with diabetes-130 data: as for `fedmesh demo --data`")],
    plan: Annotated[list[str], typer.Option(help="A shipped plan's name, or a file; repeat for more")] = [  # noqa: B006
        "readmission-logistic-private",
        "readmission-ridge-private",
    ],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each plan, with fresh noise")] = 3,
    test: Annotated[bool, typer.Option("--test", help="Judge on the test rows; tune on validation rows first")] = False,
    cache: Annotated[Path, typer.Option(help="Folder for compiled plans")] = BENCH_DIR / "compiled",
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
) -> None:
    """Compare what plans of different families learn, by the hospitals' own code without the services."""
    from services.bench.families import FamiliesOptions, run_families

    require_writable(report)
    run_families(FamiliesOptions(data, tuple(plan), seeds, test, cache, report), Console())
