"""The subcommands of `fedmesh`: one line each, the work is elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli import (
    audit,
    bench,
    doctor,
    hospital,
    inspection,
    measuring,
    measuring_stores,
    members,
    membership,
    models,
    people,
    plan,
    privacy,
    roster,
    stack,
    tradeoff,
    watching,
)
from services.cli.plan import Colluders
from services.common.errors import Code, FedmeshError
from services.plans.manifest import MAX_EPSILON

app = typer.Typer(
    name="fedmesh",
    help="Federated learning for a hospital consortium.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(audit.app, name="audit")
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.add_typer(plan.app, name="plan")
tradeoff.register(plan.app)
measuring.register(bench.app)
measuring_stores.register(bench.app)
app.add_typer(hospital.app, name="hospital")
app.add_typer(membership.app, name="members")
app.add_typer(roster.app, name="roster")
app.add_typer(privacy.app, name="privacy")
inspection.register(app)
watching.register(inspection.rounds_app)
members.register(app)
people.register(app)
stack.register(app)
doctor.register(app)


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with diabetes-130 files (diabetic_data.parquet, partition15.csv) or with UCI Heart Disease "
            "(processed.cleveland.data and the three others)"
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="`synthetic` (made here) or `diabetes130` (fetched from OpenML)")
    ] = "synthetic",
    privacy: Annotated[
        str | None,
        typer.Option(help="Epsilon for each patient, or `none`; by default 0.5, and `none` for heart data"),
    ] = None,
    colluders: Colluders = None,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospitals of the synthetic cohort")] = 15,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; the plan's own number by default")] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="Runs, each on a fresh stack with fresh ledgers: one release imagined so many times. The report then "
            "has means and standard deviations. The noise is always fresh. With heart data a seed (0, 1, ...) decides "
            "which training records are held out for validation. Cohort, partition into hospitals, test set and the "
            "plan's initial values are the same in every run",
        ),
    ] = 1,
    report: Annotated[Path | None, typer.Option(help="Write the report to this JSON file")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write test predictions to this CSV file")] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where the run lives; what an earlier demo left there is replaced")
    ] = stack.DEMO_DIR,
) -> None:
    """Train one model across hospital processes on this machine, and compare it with each hospital alone."""
    from services.demo.run import DemoOptions, default_privacy, run_demo

    if dataset not in ("synthetic", "diabetes130"):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--dataset {dataset}: use synthetic or diabetes130")
    epsilon = default_privacy(data) if privacy is None else _epsilon(privacy)
    options = DemoOptions(folder, data, dataset, hospitals, epsilon, rounds, report, predictions, seeds, colluders)
    run_demo(options, Console())


def _epsilon(text: str) -> float | None:
    if text == "none":
        return None
    try:
        epsilon = float(text)
    except ValueError:
        epsilon = 0.0
    if not 0 < epsilon <= MAX_EPSILON:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"--privacy {text}: use an epsilon above 0 and at most {MAX_EPSILON:g}, such as 0.5, or none",
        )
    return epsilon
