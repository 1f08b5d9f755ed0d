"""`fedmesh plan`: look at plans before anybody trains by them."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from services.common.errors import FedmeshError
from services.hospital_node.noise import training_noise
from services.hospital_node.training.packages import check_installed, installed_families
from services.plans.algorithms import InstalledFamily, PatientSum
from services.plans.library import plan_names, plan_path
from services.plans.manifest import PlanManifest, canonical_bytes, load_manifest, plan_id
from services.plans.variants import with_colluders
from services.privacy.accounting import epsilon_of
from services.privacy.noise import NoisePlan
from services.secure_sum.cohort import MAX_COLLUDERS, threshold
from services.secure_sum.cohort import colluders as most_colluders
from services.secure_sum.encoding import choose_lanes
from services.secure_sum.wire import Layout

Colluders = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_COLLUDERS,
        help="f: hospitals that may pool what they know with the centre; by default as many as the roster tolerates, 4 "
        "of 15. Hospitals refuse less unless their privacy.least_colluders says otherwise",
    ),
]

app = typer.Typer(help="Training plans.", no_args_is_help=True)


@app.command("list")
def list_plans() -> None:
    """List the plans that ship with fedmesh."""
    for name in plan_names():
        typer.echo(f"{name}  {plan_path(name)}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Plan in YAML")],
    hospitals: Annotated[
        int, typer.Option(min=4, max=15, help="Size of the roster, on which f and the noise rest")
    ] = 15,
    colluders: Colluders = None,
) -> None:
    """Check a plan and print its id. Exit code 1 with every problem named when it is not valid.

    With --colluders it is the plan that says so under privacy.colluders, with an id of its own.
    """
    manifest = with_colluders(load_manifest(file), colluders)
    console = Console()
    console.print(f"[green]OK[/green] {manifest.name} {plan_id(manifest)}", soft_wrap=True)
    console.print(
        f"{len(manifest.feature_names)} features, {manifest.vector_length} integers a contribution, "
        f"{manifest.rounds.count} rounds, {len(canonical_bytes(manifest)):,} bytes on the wire"
    )
    _show_family(console, manifest)
    _show_encoding(console, manifest)
    if manifest.rounds.asynchronous:
        console.print(
            f"asynchronous: groups of {manifest.rounds.k}; contributions of at most age {manifest.rounds.max_age}"
        )
    if manifest.privacy is None:
        console.print("privacy: none")
    else:
        noise = training_noise(manifest, hospitals)
        _show_privacy(console, noise)
        _show_room(console, manifest, noise)


def _show_family(console: Console, manifest: PlanManifest) -> None:
    model, algorithm = manifest.model, manifest.algorithm
    console.print(f"{model.family} with {manifest.weights_length:,} parameters, trained by {algorithm.kind}")
    if isinstance(algorithm, InstalledFamily):
        try:
            check_installed(manifest)
        except FedmeshError as error:
            console.print(f"[yellow]this machine could not train it:[/yellow] {escape(error.message)}", soft_wrap=True)
        else:
            found = installed_families()[algorithm.family]
            console.print(f"family {algorithm.family} is installed here: {escape(found)}", highlight=False)


def _show_encoding(console: Console, manifest: PlanManifest) -> None:
    encoding = manifest.encoding
    how = "a public key" if encoding.parameters.public_key else "the group key"
    layout = Layout(encoding.parameters, manifest.vector_length, encoding.lanes)
    console.print(
        f"encrypted with {how} under {encoding.parameter_set}: {encoding.lanes} lane(s) of {encoding.bits} bits, "
        f"{layout.upload_bytes:,} bytes an upload",
        soft_wrap=True,
        highlight=False,
    )


def _show_room(console: Console, manifest: PlanManifest, noise: NoisePlan) -> None:
    """How many lanes clip, noise and cohort leave room for, where the plan says how many patients are expected."""
    if not isinstance(manifest.algorithm, PatientSum):
        return
    encoding = manifest.encoding
    bound = math.ceil(manifest.summed_sensitivity * manifest.algorithm.expected_patients / noise.hospitals)
    length = manifest.train_length
    most = choose_lanes(encoding.parameters, bound, noise.hospitals, noise.share_sigma, length)
    if most < encoding.lanes:
        console.print(f"[yellow]noised sums need {most} lane(s): with {encoding.lanes} they may overflow[/yellow]")
    else:
        console.print(f"clip, noise and {noise.hospitals} hospitals leave room for {most} lane(s)", highlight=False)


def _show_privacy(console: Console, noise: NoisePlan) -> None:
    guarantee, least = noise.guarantee, threshold(noise.hospitals)
    reached = epsilon_of(noise.noise_multiplier, noise.compositions, noise.accounted_delta)
    console.print(
        f"privacy: {guarantee} for each patient with {noise.hospitals} hospitals, of which {guarantee.colluders} may "
        f"collude; noise multiplier {noise.noise_multiplier:.4f} over {noise.compositions} releases; PLD accountant: "
        f"epsilon {reached:.6f}",
        highlight=False,
    )
    if guarantee.colluders < most_colluders(noise.hospitals):
        console.print(
            f"[yellow]refused by every hospital[/yellow] whose privacy.least_colluders is not set to "
            f"{guarantee.colluders} or less",
            highlight=False,
        )
    more = [f"{number}: {noise.epsilon_against(number):.3f}" for number in range(guarantee.colluders + 1, least)]
    console.print(
        f"epsilon of a sum against more colluders than f: {', '.join(more)}. Of an update that was opened alone: "
        f"{noise.epsilon_of_shares(1):.3f}",
        highlight=False,
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
