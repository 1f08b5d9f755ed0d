"""`fedmesh hospital check-data` and `mapping`: a hospital's data and a plan, looked at before anybody trains."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.common.errors import Code, FedmeshError


def register(app: typer.Typer) -> None:
    """Add the commands to `fedmesh hospital`."""
    app.command("check-data")(check_data)
    app.command("mapping")(mapping)


def check_data(
    config: Annotated[
        Path, typer.Option(help="The hospital node's configuration; its section `data` names the source")
    ],
    plan: Annotated[str, typer.Option(help="Plan in YAML or JSON, or the name of a plan that ships with fedmesh")],
    against: Annotated[
        Path | None, typer.Option(help="Snapshot of --save to compare with, in place of the schema's own reference")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write a snapshot of the distributions: exact counts, which stay here")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report to this JSON file")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Show counts of 1 to 10, and texts of so few rows, which are withheld")
    ] = False,
) -> None:
    """Say what a plan would make of this hospital's data. Nothing is sent, no budget is spent.

    The checks are those of training. Exit code 1 when training would refuse the data.
    """
    from services.cli.data_report import DataReport, show
    from services.common.config import load_config
    from services.hospital_node.config import HospitalConfig, check_data_files
    from services.hospital_node.opening import mapping_of, opened_source, partition_of
    from services.hospital_node.sources.drift import counted_bins, drift, load_snapshot, save_snapshot
    from services.hospital_node.sources.facts import inspect
    from services.plans.library import plan_path
    from services.plans.manifest import load_manifest

    data = load_config(HospitalConfig, config).data
    manifest = load_manifest(Path(plan) if Path(plan).is_file() else plan_path(plan))
    _ = manifest.network
    check_data_files(data)
    schema = manifest.feature_schema
    before = load_snapshot(against, schema) if against is not None else None
    with opened_source(data, manifest) as source, Console(stderr=True).status(f"Reading {source.name} ..."):
        merge = data.patients_across_files == "merge"
        found = inspect(source, manifest, mapping_of(data), partition_of(data), merge_patients=merge)
    reference = schema.reference if before is None else before.bins
    name = f"the reference of schema {schema.name!r}" if before is None else str(against)
    now = {} if found.facts is None else counted_bins(found.facts, schema)
    result = DataReport(manifest, found, drift(reference, now), name if reference else None, exact)
    show(Console(), result)
    if save is not None and found.facts is not None:
        save_snapshot(save, found.facts, schema)
    if report is not None:
        _write(report, json.dumps(result.document(), indent=2) + "\n")
    if not result.accepted:
        raise typer.Exit(1)


def mapping(
    source: Annotated[str, typer.Argument(help="omop or fhir")],
    schema: Annotated[str, typer.Argument(help="Name of the feature schema")] = "readmission",
) -> None:
    """Print the SQL by which OMOP or FHIR data becomes a schema's columns, to start a mapping of your own from."""
    from services.hospital_node.sources.staging import shipped_mapping

    typer.echo(shipped_mapping(source, schema), nl=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error
