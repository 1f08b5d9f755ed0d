"""`fedmesh bench asynchronous`: whether one slow hospital slows the others, in rounds of either mode.

Real services and real hospital nodes over mutual TLS; only training is played, by waiting, so that a slow hospital is
slow by itself and not because all of them share this machine.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console
from rich.table import Table

from services.bench.hospital import noted_sums, sum_digest
from services.bench.vectors import WEIGHT_BITS, vector
from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.demo.progress import Progress, watch_job
from services.demo.run import APPROVER, all_connected, approved, prepare
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.stack import Stack
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes
from services.plans.staleness import weight_units
from services.secure_sum.cohort import threshold

SEED: Final = 21
SLOWNESS: Final = 10
_LANES: Final = 1
# A result of the slow hospital is that old when it is ready, more or less.
_MAX_AGE: Final = 2 * SLOWNESS


@dataclass(frozen=True)
class AsynchronousOptions:
    """rounds: of every asynchronous job; a synchronous one with a slow hospital has a third. train_s: of a fast one."""

    folder: Path
    hospitals: int = 6
    rounds: int = 10
    train_s: float = 1.0
    params: int = 2048
    report: Path | None = None


@dataclass(frozen=True)
class ModeReport:
    """One mode. rounds_per_minute_*: from the first commit to the last. slowed_by: 1 - with a slow one / without.

    slow_contributed: rounds that the slow hospital is in. slow_ages: the ages of what it contributed.
    """

    rounds_per_minute_even: float
    rounds_per_minute_slow: float
    slowed_by: float
    slow_contributed: int
    slow_ages: tuple[int, ...]


@dataclass(frozen=True)
class AsynchronousReport:
    """exact: in every round at least t hospitals decrypted the sum, and each of them exactly that of the integers."""

    hospitals: int
    k: int
    train_s: float
    slowness: int
    asynchronous: ModeReport
    synchronous: ModeReport
    exact: bool


def _name(mode: str, slow: bool) -> str:
    return f"bench-{mode}-{'slow' if slow else 'even'}"


def mode_plan(options: AsynchronousOptions, mode: str, *, slow: bool) -> PlanManifest:
    """A plan that only sums. Raises: FedmeshError(PLAN_INVALID)."""
    count = options.rounds if mode == "asynchronous" or not slow else max(3, options.rounds // 3)
    rounds: dict[str, Any] = {"count": count, "mode": mode, "ready_deadline_s": 300, "phase_deadline_s": 60}
    if mode == "asynchronous":
        rounds |= {"k": threshold(options.hospitals), "max_age": _MAX_AGE}
    document: dict[str, Any] = json.loads(canonical_bytes(shipped_plan("readmission-logistic")))
    document |= {
        "name": _name(mode, slow),
        "description": "Integers from a seed; measures rounds with a slow hospital.",
        "model": {"family": "integer_vector", "length": options.params},
        "algorithm": {"kind": "sum_only"},
        "metrics": None,
        "rounds": rounds,
    }
    document["encoding"] = {**document["encoding"], "lanes": _LANES, "scale": 1.0}
    return validate(PlanManifest, document, "the benchmark's plan", Code.PLAN_INVALID)


def run_asynchronous(options: AsynchronousOptions, console: Console) -> AsynchronousReport:
    """Run the benchmark. Whatever happens, nothing is left running.

    Raises: FedmeshError: bad options, a part that did not start, or a failed job.
    """
    plans = [mode_plan(options, mode, slow=slow) for mode in ("asynchronous", "synchronous") for slow in (False, True)]
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    stack = Stack(options.folder / "stack", guard=guard, traces=False)
    try:
        names = [f"hospital-{number:02d}" for number in range(1, options.hospitals + 1)]
        with console.status("Starting PostgreSQL, Redis, the four services and the hospitals ..."):
            stack.start()
            stack.found(names)
            hospitals = [(name, _hospital(options, stack, number, name)) for number, name in enumerate(names)]
            stack.start_hospitals(hospitals, module="bench.hospital")
        done = {plan.name: _run(stack, plan, names, console, first=plan is plans[0]) for plan in plans}
    finally:
        with console.status("Stopping everything ..."):
            stack.stop()
            guard.close()
    report = AsynchronousReport(
        hospitals=options.hospitals,
        k=threshold(options.hospitals),
        train_s=options.train_s,
        slowness=SLOWNESS,
        asynchronous=_mode(done, "asynchronous", names[-1]),
        synchronous=_mode(done, "synchronous", names[-1]),
        exact=all(_exact(stack, plan, done[plan.name], names, options.params) for plan in plans),
    )
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _print(console, report)
    return report


def _data_file(stack: Stack, name: str) -> Path:
    return stack.folder / "vectors" / name / "vector.json"


def _hospital(options: AsynchronousOptions, stack: Stack, number: int, name: str) -> dict[str, Any]:
    """A node's settings; the last hospital is the slow one, in the plans that have one."""
    last = number == options.hospitals - 1
    train_s = {
        _name(mode, slow): options.train_s * (SLOWNESS if slow and last else 1)
        for mode in ("asynchronous", "synchronous")
        for slow in (False, True)
    }
    path = _data_file(stack, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seed": SEED, "hospital": number, "train_s": train_s}), encoding="utf-8")
    return {"population": name, "data": {"file": str(path)}, "privacy": {"allow_without_privacy": True}}


def _run(
    stack: Stack, plan: PlanManifest, names: Sequence[str], console: Console, *, first: bool
) -> list[registry_pb2.CommittedRound]:
    """One job, from its plan to its last round. first: of the stack. Raises: FedmeshError."""
    progress = Progress(tuple(names), plan.rounds.count)
    with View(console, f"fedmesh bench asynchronous: {plan.name}, {len(names)} hospitals", None) as view:
        asyncio.run(_drive(stack, plan, progress, view, first=first))
    if progress.job is None or progress.job.status != registry_pb2.JOB_STATUS_COMPLETED:
        reason = "" if progress.job is None else progress.job.reason
        raise FedmeshError(Code.INTERNAL, f"the benchmark's job {plan.name} did not complete: {reason}")
    return progress.rounds


async def _drive(stack: Stack, plan: PlanManifest, progress: Progress, view: View, *, first: bool) -> None:
    async def changed(now: Progress) -> None:
        view.show(now)

    async with (
        stub(stack, "registry") as registry,
        stub(stack, "registry", stack.operator(APPROVER)) as second,
        stub(stack, "coordinator") as coordinator,
    ):
        if first:
            plan_id = await prepare(registry, second, stack, plan, progress.hospitals)
        else:
            plan_id = await approved(registry, second, plan)
        await all_connected(stack, coordinator, progress, view)
        job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=progress.hospitals)
        job_id = (await call(registry.CreateJob, job, patience_s=30)).job.job_id
        await watch_job(registry, coordinator, job_id, progress, changed)


def _mode(done: dict[str, list[registry_pb2.CommittedRound]], mode: str, slow_one: str) -> ModeReport:
    even, slow = (_rounds_per_minute(done[_name(mode, slow)]) for slow in (False, True))
    ages = [item.age for one in done[_name(mode, True)] for item in one.contributions if item.hospital_id == slow_one]
    return ModeReport(even, slow, 1 - slow / even, len(ages), tuple(ages))


def _rounds_per_minute(rounds: Sequence[registry_pb2.CommittedRound]) -> float:
    # From the first commit on: before it hospitals also took the job and opened their data.
    first, last = (done.committed_at.ToDatetime() for done in (rounds[0], rounds[-1]))
    return 60 * (len(rounds) - 1) / (last - first).total_seconds()


def _exact(
    stack: Stack, plan: PlanManifest, rounds: Sequence[registry_pb2.CommittedRound], names: Sequence[str], params: int
) -> bool:
    spare = WEIGHT_BITS if plan.rounds.asynchronous else 0
    noted = {name: noted_sums(_data_file(stack, name), plan.name) for name in names}
    for done in rounds:
        expected = np.zeros(params, dtype=np.int64)
        for item in done.contributions:
            number, trained_for = names.index(item.hospital_id), done.version - item.age
            weight = weight_units(item.age) if plan.rounds.asynchronous else 1
            expected += weight * vector(SEED, number, trained_for, params, _LANES, spare)
        seen = [
            noted[item.hospital_id][done.version]
            for item in done.contributions
            if done.version in noted[item.hospital_id]
        ]
        if set(seen) != {sum_digest(expected)} or len(seen) < threshold(len(names)):
            return False
    return True


def _print(console: Console, report: AsynchronousReport) -> None:
    table = Table(
        title=f"{report.hospitals} hospitals that train {report.train_s:g} s a round, one of them {report.slowness} "
        f"times as long; asynchronous groups of {report.k}"
    )
    table.add_column("measure")
    for mode in ("asynchronous", "synchronous"):
        table.add_column(mode, justify="right")
    modes = (report.asynchronous, report.synchronous)
    rows = {
        "rounds a minute, all alike": [f"{mode.rounds_per_minute_even:.1f}" for mode in modes],
        "rounds a minute, with the slow one": [f"{mode.rounds_per_minute_slow:.1f}" for mode in modes],
        "the others are slowed by": [f"{100 * mode.slowed_by:.1f} %" for mode in modes],
        "rounds with the slow one's contribution": [str(mode.slow_contributed) for mode in modes],
        "  their ages": [" ".join(map(str, mode.slow_ages)) for mode in modes],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)
    console.print(f"every sum exact: {'yes' if report.exact else 'NO'}")
