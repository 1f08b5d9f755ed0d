"""Model versions, `fedmesh rounds`, `jobs`: look at what a centre holds; a stack need not run."""

from typing import Annotated, Any

import typer
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console
from rich.markup import escape

from services.cli.centre import CentreFile, Place, find_place, require_nowhere
from services.cli.mesh import ask, or_why
from services.cli.stack import DEMO_DIR, DemoDir
from services.cli.tables import make_table
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.plans.staleness import WEIGHT_UNITS, weight_units

rounds_app = typer.Typer(help="List the committed rounds of a job, or follow a job while it runs.")
_NEEDS = ("audit", "registry")
Limit = Annotated[int, typer.Option(min=1, max=500, help="At most so many rows")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(rounds_app, name="rounds")
    app.command()(jobs)


def list_versions(place: Place, limit: int) -> None:
    """Print model versions, newest first."""

    async def read(registry: Any) -> Any:
        return await call(registry.ListModelVersions, registry_pb2.ListModelVersionsRequest(page_size=limit))

    answer = ask(place, "registry", read, _NEEDS)
    by_job: dict[str, list[registry_pb2.ModelVersion]] = {}
    for version in answer.model_versions:
        by_job.setdefault(version.job_id, []).append(version)
    for job_id, versions in by_job.items():
        console = Console()
        console.print(f"\njob {job_id}, plan {versions[0].plan_name} ({versions[0].plan_id})", soft_wrap=True)
        table = make_table(
            "version", "final", "private", "hospitals", "state (SHA-256)", "encrypted sum (SHA-256)", "burnt"
        )
        for version in versions:
            table.add_row(
                str(version.version),
                "yes" if version.final else "",
                "yes" if version.private else "no",
                str(len(version.round.contributions)),
                version.state_sha256[:16],
                version.round.sum_sha256[:16],
                "state of before" if version.round.burnt else "",
            )
        console.print(table)


@rounds_app.callback(invoke_without_command=True)
def rounds(
    context: typer.Context,
    folder: DemoDir = None,
    job: Annotated[str, typer.Option(help="Job, or its first characters; the newest job by default")] = "",
    limit: Limit = 500,
    centre: CentreFile = None,
) -> None:
    """List the committed rounds of a job with their metrics; `watch` follows a job while it runs."""
    if context.invoked_subcommand is not None:
        require_nowhere(folder, centre, context.invoked_subcommand)
        return

    async def read(registry: Any) -> Any:
        from services.cli.versions import find_job

        job_id = await find_job(registry, job) if job else await newest_job(registry)
        found = await call(registry.ListRounds, registry_pb2.ListRoundsRequest(job_id=job_id, page_size=limit))
        asked = call(registry.ListMetrics, registry_pb2.ListMetricsRequest(job_id=job_id))
        return found.rounds, *await or_why(asked)

    found, metrics, unmeasured = ask(find_place(folder, centre, DEMO_DIR), "registry", read, _NEEDS)
    by_version: dict[int, dict[str, float]] = {}
    for metric in metrics.metrics if metrics else ():
        by_version.setdefault(metric.version, {})[metric.name] = metric.value
    aged = any(item.age for done in found for item in done.contributions)
    shown = ("finalizer", "ages") if aged else ("finalizer",)
    table = make_table("round", "attempt", "agreeing", *shown, "overhead", "loss", "AUROC", "burnt")
    for done in found:
        seconds = (done.committed_at.ToDatetime() - done.sealed_at.ToDatetime()).total_seconds()
        measured = by_version.get(done.version, {})
        table.add_row(
            str(done.version),
            str(done.attempt.attempt),
            f"{len(done.agreeing)} of {len(done.contributions)}",
            "[red]burnt[/red]" if done.burnt else done.finalizer,
            *([ages(done)] if aged else []),
            f"{seconds:.2f} s",
            *(f"{measured[name]:.4f}" if name in measured else "" for name in ("loss", "auroc")),
            (done.burnt_reason or "yes") if done.burnt else "",
        )
    console = Console()
    console.print(table)
    console.print(
        "[dim]overhead: sealed to committed. Loss and AUROC: the consortium's validation rows, from the secure sum, of "
        "the state that the round started from. A burnt round was opened for nobody: its version keeps the state of "
        "the one before, and its privacy budget stays spent.[/dim]"
    )
    if unmeasured:
        console.print(f"[yellow]loss and AUROC: {escape(unmeasured)}[/yellow]", highlight=False)
    if aged:
        console.print(
            "[dim]ages: how many versions older than the newest the hospitals' contributions were trained on, with the "
            f"staleness weight in {WEIGHT_UNITS}ths. Public: each hospital signed its own.[/dim]"
        )


def ages(done: registry_pb2.CommittedRound) -> str:
    """A round's contributions by age, with the weight of each age: `0 (64): 9, 2 (36): hospital-07`."""
    by_age: dict[int, list[str]] = {}
    for item in done.contributions:
        by_age.setdefault(item.age, []).append(item.hospital_id)
    return ", ".join(
        f"{age} ({weight_units(age)}): {len(names) if age == 0 else ' '.join(sorted(names))}"
        for age, names in sorted(by_age.items())
    )


def jobs(folder: DemoDir = None, limit: Limit = 20, centre: CentreFile = None) -> None:
    """List jobs, newest first."""

    async def read(registry: Any) -> Any:
        return await call(registry.ListJobs, registry_pb2.ListJobsRequest(page_size=limit))

    answer = ask(find_place(folder, centre, DEMO_DIR), "registry", read, _NEEDS)
    table = make_table("job", "plan", "status", "rounds", "hospitals", "reason")
    for found in answer.jobs:
        table.add_row(
            found.job_id,
            found.plan_name,
            registry_pb2.JobStatus.Name(found.status).removeprefix("JOB_STATUS_").lower(),
            f"{found.version}/{found.rounds}",
            str(len(found.hospital_ids)),
            found.reason,
        )
    Console().print(table)


async def newest_job(registry: Any) -> str:
    """The id of the newest job. Raises: FedmeshError(NOT_FOUND) when there is none."""
    answer = await call(registry.ListJobs, registry_pb2.ListJobsRequest(page_size=1))
    if not answer.jobs:
        raise FedmeshError(Code.NOT_FOUND, "no job was ever started here")
    return str(answer.jobs[0].job_id)
