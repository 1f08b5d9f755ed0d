"""`fedmesh bench jobs`: many small jobs at a time, on real services and real hospital nodes with light training."""

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.bench.usage import WORKERS, cpu_seconds
from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.demo.progress import Progress as Watched
from services.demo.run import APPROVER, all_connected, prepare
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.stack import SERVICES, Stack
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes

_SEED: Final = 7
_POLL_S: Final = 0.5
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True)
class JobsOptions:
    """jobs: measured ones, after one that warms up. concurrent: so many run at a time. rounds: of each job."""

    folder: Path
    jobs: int = 24
    concurrent: int = 8
    rounds: int = 10
    hospitals: int = 15
    report: Path | None = None


@dataclass(frozen=True)
class JobsReport:
    """What the run measured. job_s: from the proposal of its plan to its last commit. centre_cpu_s and hospital_cpu_s:
    of the four services, and of all hospitals together, per job. burnt_rounds, extra_attempts: over all jobs.
    """

    jobs: int
    concurrent: int
    rounds: int
    hospitals: int
    parameters: int
    wall_s: float
    models_per_hour: float
    rounds_per_s: float
    job_s: dict[str, float]
    centre_cpu_s: float
    hospital_cpu_s: float
    centre_cpu_by_service_s: dict[str, float]
    burnt_rounds: int
    extra_attempts: int


def job_plan(number: int, rounds: int) -> PlanManifest:
    """The shipped private plan without metrics and checks, under a name, and so with a population, of its own."""
    document: dict[str, Any] = json.loads(canonical_bytes(shipped_plan("readmission-logistic-private")))
    document |= {"name": f"bench-job-{number:05d}", "metrics": None, "checks": None}
    document["rounds"]["count"] = rounds
    document["algorithm"]["average_last"] = 1
    return validate(PlanManifest, document, "the benchmark's plan", Code.PLAN_INVALID)


def run_jobs(options: JobsOptions, console: Console) -> JobsReport:
    """Run the benchmark. Whatever happens, nothing is left running.

    Raises: FedmeshError: bad options, a part that did not start, or a failed job.
    """
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    # A hospital that takes part in more jobs at once sends more reports, and says so to whoever runs the centre.
    rate = {"per_second": 20.0 * options.concurrent, "burst": 60 * options.concurrent}
    stack = Stack(options.folder / "stack", guard=guard, settings={"coordinator": {"rate": rate}}, traces=False)
    names = [f"hospital-{number:02d}" for number in range(1, options.hospitals + 1)]
    try:
        with console.status("Starting PostgreSQL, Redis, the four services and the hospitals ..."):
            stack.start()
            stack.found(names)
            stack.start_hospitals(
                ((name, _hospital(stack, number, name, options)) for number, name in enumerate(names)),
                module="bench.hospital",
            )
        report = asyncio.run(_Run(options, console, stack, names).measure())
    finally:
        with console.status("Stopping everything ..."):
            stack.stop()
            guard.close()
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _print(console, report)
    return report


def _hospital(stack: Stack, number: int, name: str, options: JobsOptions) -> dict[str, Any]:
    path = stack.folder / "cohorts" / name / "cohort.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seed": _SEED, "hospital": number}), encoding="utf-8")
    jobs = {"max_jobs": min(64, 2 * options.concurrent)}
    return {"population": name, "data": {"file": str(path)}, "limits": jobs}


class _Run:
    def __init__(self, options: JobsOptions, console: Console, stack: Stack, names: list[str]) -> None:
        self._options = options
        self._console = console
        self._stack = stack
        self._names = names
        self._seconds: list[float] = []
        self._ended: list[str] = []

    async def measure(self) -> JobsReport:
        options, stack = self._options, self._stack
        plan = job_plan(0, options.rounds)
        async with (
            stub(stack, "registry") as registry,
            stub(stack, "registry", stack.operator(APPROVER)) as second,
            stub(stack, "coordinator") as coordinator,
        ):
            self._registry, self._second = registry, second
            plan_id = await prepare(registry, second, stack, plan, self._names)
            with View(self._console, "fedmesh bench jobs", None) as view:
                await all_connected(stack, coordinator, Watched(tuple(self._names)), view)
            with self._console.status("One job to warm up ..."):
                await self._finish(await self._start(plan_id))
            before, started = cpu_seconds(stack), time.monotonic()
            await self._all_jobs()
            wall_s = time.monotonic() - started
            used = {name: seconds - before[name] for name, seconds in cpu_seconds(stack).items() if name != WORKERS}
            burnt, extra = await self._mishaps()
        centre = {name: used[name] / options.jobs for name in SERVICES}
        return JobsReport(
            jobs=options.jobs,
            concurrent=options.concurrent,
            rounds=options.rounds,
            hospitals=len(self._names),
            parameters=plan.vector_length,
            wall_s=wall_s,
            models_per_hour=3600 * options.jobs / wall_s,
            rounds_per_s=options.jobs * options.rounds / wall_s,
            job_s={f"p{q}": float(np.quantile(self._seconds, q / 100)) for q in (50, 99)},
            centre_cpu_s=sum(centre.values()),
            hospital_cpu_s=sum(used[name] for name in self._names) / options.jobs,
            centre_cpu_by_service_s=centre,
            burnt_rounds=burnt,
            extra_attempts=extra,
        )

    async def _all_jobs(self) -> None:
        numbers = iter(range(1, self._options.jobs + 1))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(f"jobs of {self._options.rounds} rounds", total=self._options.jobs)

            async def work() -> None:
                for number in numbers:
                    started = time.monotonic()
                    job_id = await self._start(await self._approved(number))
                    await self._finish(job_id)
                    self._seconds.append(time.monotonic() - started)
                    self._ended.append(job_id)
                    bar.advance(task)

            async with asyncio.TaskGroup() as group:
                for _ in range(self._options.concurrent):
                    group.create_task(work())

    async def _approved(self, number: int) -> str:
        manifest = canonical_bytes(job_plan(number, self._options.rounds))
        proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=manifest)
        plan_id: str = (await call(self._registry.CreatePlan, proposal, patience_s=_PATIENCE_S)).plan.plan_id
        approval = registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)
        await call(self._second.ApprovePlan, approval, patience_s=_PATIENCE_S)
        return plan_id

    async def _start(self, plan_id: str) -> str:
        job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=self._names)
        job_id: str = (await call(self._registry.CreateJob, job, patience_s=_PATIENCE_S)).job.job_id
        return job_id

    async def _finish(self, job_id: str) -> None:
        request = registry_pb2.GetJobRequest(job_id=job_id)
        while True:
            job = (await call(self._registry.GetJob, request, patience_s=_PATIENCE_S)).job
            if job.status == registry_pb2.JOB_STATUS_COMPLETED:
                return
            if job.status != registry_pb2.JOB_STATUS_RUNNING:
                raise FedmeshError(Code.INTERNAL, f"job {job_id} did not complete: {job.reason}")
            await asyncio.sleep(_POLL_S)

    async def _mishaps(self) -> tuple[int, int]:
        burnt = extra = 0
        for job_id in self._ended:
            request = registry_pb2.ListRoundsRequest(job_id=job_id)
            rounds = (await call(self._registry.ListRounds, request, patience_s=_PATIENCE_S)).rounds
            burnt += sum(done.burnt for done in rounds)
            extra += sum(done.attempt.attempt - 1 for done in rounds)
        return burnt, extra


def _print(console: Console, report: JobsReport) -> None:
    table = Table(title=f"{report.jobs} jobs of {report.rounds} rounds, {report.hospitals} hospitals")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        f"models an hour, {report.concurrent} jobs at a time": f"{report.models_per_hour:.0f}",
        "rounds a second": f"{report.rounds_per_s:.2f}",
        "a job, from its plan to its last commit, p50": f"{report.job_s['p50']:.1f} s",
        "a job, p99": f"{report.job_s['p99']:.1f} s",
        "CPU of the centre a job": f"{report.centre_cpu_s:.1f} s",
        **{f"  {name}": f"{seconds:.1f} s" for name, seconds in report.centre_cpu_by_service_s.items()},
        f"CPU of {report.hospitals} hospitals a job": f"{report.hospital_cpu_s:.1f} s",
        "rounds burnt / attempts repeated": f"{report.burnt_rounds} / {report.extra_attempts}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
