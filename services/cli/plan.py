"""`fedmesh plan`: look at plans before anybody trains by them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.plans.library import plan_names, plan_path
from services.plans.manifest import canonical_bytes, load_manifest, plan_id
from services.privacy.accounting import epsilon_of, gaussian_multiplier

app = typer.Typer(help="Training plans.", no_args_is_help=True)


@app.command("list")
def list_plans() -> None:
    """List the plans that ship with fedmesh."""
    for name in plan_names():
        typer.echo(f"{name}  {plan_path(name)}")


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Plan in YAML")]) -> None:
    """Check a plan and print its id. Exit code 1 with every problem named when it is not valid."""
    manifest = load_manifest(file)
    console = Console()
    privacy = manifest.privacy
    guarantee = f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} a patient" if privacy else "none"
    if privacy:
        releases = manifest.rounds.count + privacy.extra_attempts
        multiplier = gaussian_multiplier(privacy.epsilon, privacy.delta, releases)
        reached = epsilon_of(multiplier, releases, privacy.delta)
        guarantee += f" (noise multiplier {multiplier:.4f} over {releases} releases; PLD accountant: {reached:.6f})"
    console.print(f"[green]OK[/green] {manifest.name} {plan_id(manifest)}", soft_wrap=True)
    console.print(
        f"{len(manifest.feature_names)} features, {manifest.vector_length} integers a contribution, "
        f"{manifest.rounds.count} rounds, privacy: {guarantee}, {len(canonical_bytes(manifest)):,} bytes on the wire"
    )


@app.command("compile")
def compile_command(
    file: Annotated[Path, typer.Argument(help="Plan in YAML or JSON")],
    cache: Annotated[Path, typer.Option(help="The hospital node's `compile_cache` folder")],
) -> None:
    """Compile a plan with TensorFlow Federated ahead of its first round (some 15 s, once for each plan)."""
    from services.hospital_node.training.cache import compiled_plan

    manifest = load_manifest(file)
    with Console().status(f"Compiling {manifest.name} with TensorFlow Federated ..."):
        compiled_plan(manifest, cache)
    Console().print(f"[green]OK[/green] {plan_id(manifest)} is in {cache}", soft_wrap=True)
