"""`fedmesh plan tradeoff`: choose epsilon before anybody's privacy is spent."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.plan import Colluders
from services.common.errors import Code, FedmeshError
from services.plans.library import plan_named
from services.plans.variants import with_colluders
from services.tradeoff.grid import DEFAULT_GRID, KEEP, parse_grid


def register(app: typer.Typer) -> None:
    """Add the command to `fedmesh plan`."""
    app.command("tradeoff")(tradeoff)


def tradeoff(
    plan: Annotated[str, typer.Argument(help="Plan in YAML, or the name of a shipped plan")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with PUBLIC records: diabetic_data.parquet and partition15.csv; test rows are not used"
        ),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="A cohort that is made here; nobody in it exists")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="I vouch that everybody may have the records in --data anyway")
    ] = False,
    epsilon: Annotated[str, typer.Option(help="Values of epsilon, with commas")] = DEFAULT_GRID,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Runs at each epsilon; the noise is always fresh, nothing else changes")
    ] = 5,
    keep: Annotated[
        float, typer.Option(help="Recommend the smallest epsilon that keeps this share of the gain over chance")
    ] = KEEP,
    colluders: Colluders = None,
    hospitals: Annotated[int, typer.Option(min=4, max=15, help="Hospitals of the synthetic cohort")] = 15,
    ledger: Annotated[
        list[Path] | None, typer.Option(help="A hospital node's `data_dir`, whose remaining budget counts; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the curve into this PNG file")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file")] = None,
) -> None:
    """Draw what a private plan's model loses for a smaller epsilon, on held-out rows, and recommend one.

    The hospital node's own training, clipping and noise, in one process, without services and encryption. For public
    and synthetic data only: on a hospital's own patients every run would be a release that has to be charged.
    """
    from services.tradeoff.run import TradeoffOptions, run_tradeoff

    if (data is None) != synthetic:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "say either --synthetic or --data DIR: on which data is it to be tried?"
        )
    if not 0 < keep <= 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--keep {keep:g}: use a share above 0 and at most 1")
    if out is not None and out.suffix.lower() != ".png":
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--out {out}: the picture is a PNG, name it so")
    options = TradeoffOptions(
        plan=with_colluders(plan_named(plan), colluders),
        epsilons=parse_grid(epsilon),
        data=data,
        public=public,
        hospitals=hospitals,
        seeds=seeds,
        keep=keep,
        ledgers=tuple(ledger or ()),
        out=out,
        report=report,
    )
    run_tradeoff(options, Console())
