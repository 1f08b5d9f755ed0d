"""`fedmesh rounds watch`: follow a job while it runs, on a screen that redraws or line by line."""

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console

from services.cli.centre import Centre, CentreFile, RemoteCentre, find_place
from services.cli.inspection import newest_job
from services.cli.mesh import reach, stub
from services.cli.stack import DEMO_DIR, DemoDir
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.embedded.stack import Stack


def register(rounds: typer.Typer) -> None:
    """Add the command to `fedmesh rounds`."""
    rounds.command()(watch)


def watch(
    job: Annotated[str, typer.Argument(help="Job, or its first characters; the newest job by default")] = "",
    folder: DemoDir = None,
    centre: CentreFile = None,
) -> None:
    """Follow a job until it ends: who is connected, which phase runs, what was committed. Exit code 1 if it fails.

    A service that is away for a while is waited for. Ctrl-C ends the view and nothing else.
    """
    place = find_place(folder, centre, DEMO_DIR)
    with reach(place, ()) if isinstance(place, RemoteCentre) else nullcontext(_running(place)) as watched:
        ended = asyncio.run(_follow(watched, job))
    status = registry_pb2.JobStatus.Name(ended.status).removeprefix("JOB_STATUS_").lower()
    typer.echo(f"job {ended.job_id} {status}{f': {ended.reason}' if ended.reason else ''}")
    if ended.status == registry_pb2.JOB_STATUS_FAILED:
        raise typer.Exit(1)


def _running(folder: Path) -> Stack:
    """The stack in a folder. Raises: FedmeshError(NOT_FOUND) | (WRONG_STATE) when nothing runs there to be watched."""
    stack = Stack(folder)
    if not stack.exists():
        raise FedmeshError(
            Code.NOT_FOUND, f"there is no stack in {folder}: name another --dir, or a centre elsewhere by --centre"
        )
    stopped = [part.name for part in stack.status() if part.name in ("registry", "coordinator") and not part.running]
    if stopped:
        raise FedmeshError(Code.WRONG_STATE, f"{', '.join(stopped)} in {folder} is stopped: nothing runs there")
    return stack


async def _follow(centre: Centre, asked: str) -> registry_pb2.Job:
    from services.cli.versions import find_job
    from services.demo.progress import Progress, watch_job
    from services.demo.view import View

    async with stub(centre, "registry") as registry, stub(centre, "coordinator") as coordinator:
        job_id = await find_job(registry, asked) if asked else await newest_job(registry)
        job = (await call(registry.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job
        progress = Progress(tuple(job.hospital_ids), total_rounds=job.rounds)
        with View(Console(), f"{job.plan_name}, job {job_id}", None) as view:

            async def changed(now: Progress) -> None:
                view.show(now)

            await watch_job(registry, coordinator, job_id, progress, changed)
        return progress.job or job
