"""`fedmesh hospital attacks`: what attacks on membership found in a hospital's own rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to `fedmesh hospital`."""
    app.command("attacks")(attacks)


def attacks(
    config: Annotated[Path, typer.Option(help="The hospital node's configuration; the node may run")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables")] = False,
) -> None:
    """Show what attacks on membership found in this hospital's own rows, for each finished job with checks.

    The node runs tensorflow_privacy's attacks on the last version by itself, after the job. AUC 0.5 and advantage 0 are
    guessing. The figures are exact, not noised: nobody else has them, and they should not leave the hospital.
    """
    from services.cli.tables import make_table
    from services.common.config import load_config
    from services.hospital_node.config import HospitalConfig
    from services.hospital_node.store.attacks import ATTACKS_FOLDER, load_reports

    reports = load_reports(load_config(HospitalConfig, config).data_dir / ATTACKS_FOLDER)
    if as_json:
        typer.echo(json.dumps([asdict(report) for report in reports], indent=2))
        return
    if not reports:
        typer.echo(
            "No attack was made yet: a node attacks the last version of each finished job whose plan has checks."
        )
        return
    table = make_table("version", "made", "attack", "rows", "training", "validation", "AUC", "advantage")
    for report in reports:
        version, made = f"{report.job_id[:8]}/{report.version}", report.made_at[:16].replace("T", " ")
        for one in report.attacks:
            counts = f"{one.train_rows:,}", f"{one.validation_rows:,}"
            table.add_row(version, made, one.attack, one.rows, *counts, f"{one.auc:.4f}", f"{one.advantage:.4f}")
        if not report.attacks:
            table.add_row(version, made, "none", "too few rows", "", "", "", "")
    Console().print(table)
