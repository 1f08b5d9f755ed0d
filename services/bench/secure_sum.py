"""`fedmesh bench secure-sum`: whole rounds of the secure sum, every party a process of its own, over mutual TLS."""

import asyncio
import json
import re
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console
from rich.table import Table

from services.bench.hospital import noted_sums, sum_digest
from services.bench.kernels import Kernels, measure
from services.bench.usage import WORKERS, cpu_seconds, families
from services.bench.vectors import spare_bits, vector
from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.demo.progress import Progress, watch_job
from services.demo.run import APPROVER, all_connected, prepare
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.processes import free_port
from services.embedded.stack import SERVICES, Stack
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes
from services.secure_sum.cohort import threshold
from services.secure_sum.parameters import DEFAULT, parameter_set
from services.secure_sum.wire import Layout, layout_of

SEED: Final = 20
# The first round also loads libraries and fills caches, and is not counted.
WARM_UP: Final = 1
PLAN: Final = "bench-secure-sum"
_PHASE_LINE: Final = re.compile(r'fedmesh_coordinator_phase_seconds_(sum|count)\{phase="(\w+)"\} (\S+)')


@dataclass(frozen=True)
class BenchOptions:
    """params: integers a hospital sends. rounds: measured ones. lanes: values a coefficient. parameters: the set."""

    folder: Path
    params: int
    hospitals: int = 15
    lanes: int = 2
    rounds: int = 5
    report: Path | None = None
    parameters: str = DEFAULT.name


@dataclass(frozen=True)
class SecureSumReport:
    """What the run measured. round_s: sealed to committed. phase_s: mean over the measured and the warm-up rounds.

    centre_cpu_s: CPU of the four services and their workers in one round; stores_cpu_s: of PostgreSQL and Redis.
    centre_adding_cpu_s: the part of the services' that reads, checks and adds ciphertexts and takes masks off.
    hospital_cpu_s: of one hospital in one round, training left out because there is none. aggregator_peak_extra_mb:
    most memory that the aggregator's processes held beyond what they held after the round that warms up.
    add_over_bandwidth_bound: see `kernels.Kernels`. exact: in every round at least t hospitals decrypted the sum, and
    each of them exactly the sum of the integers.
    """

    params: int
    hospitals: int
    lanes: int
    parameter_set: str
    upload_bytes_per_parameter: float
    download_bytes_per_parameter: float
    round_s: dict[str, float]
    phase_s: dict[str, float]
    centre_cpu_s: float
    centre_cpu_by_service_s: dict[str, float]
    stores_cpu_s: dict[str, float]
    centre_adding_cpu_s: float
    hospital_cpu_s: float
    aggregator_peak_extra_mb: float
    ciphertext_set_mb: float
    peak_process_mb: float
    add_over_bandwidth_bound: float
    exact: bool
    rounds: int


def bench_plan(options: BenchOptions) -> PlanManifest:
    """A plan that only sums. Raises: FedmeshError(PLAN_INVALID) for a length or lanes that no plan may have."""
    document: dict[str, Any] = json.loads(canonical_bytes(shipped_plan("readmission-logistic")))
    document |= {
        "name": PLAN,
        "description": "Integers from a seed; measures the secure sum.",
        "model": {"family": "integer_vector", "length": options.params},
        "algorithm": {"kind": "sum_only"},
        "metrics": None,
        "rounds": {
            "count": options.rounds + WARM_UP,
            "mode": "synchronous",
            "ready_deadline_s": 600,
            "phase_deadline_s": 600,
        },
    }
    encoding = {"parameter_set": options.parameters, "lanes": options.lanes, "scale": 1.0}
    document["encoding"] = {**document["encoding"], **encoding}
    return validate(PlanManifest, document, "the benchmark's plan", Code.PLAN_INVALID)


def run_secure_sum(options: BenchOptions, console: Console) -> SecureSumReport:
    """Run the benchmark. Whatever happens, nothing is left running.

    Raises: FedmeshError: bad options, a part that did not start, or a failed job.
    """
    plan = bench_plan(options)
    layout = layout_of(plan.encoding.parameter_set, plan.vector_length, plan.encoding.lanes)
    with console.status("Measuring the arithmetic alone ..."):
        kernels = measure(layout, options.hospitals)
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    port = free_port()
    chunks = options.folder.absolute() / "stack" / "chunks"
    settings = {
        "coordinator": {"server": {"metrics_listen": f"127.0.0.1:{port}"}},
        "aggregator": {"chunks": {"directory": str(chunks)}},
    }
    stack = Stack(options.folder / "stack", guard=guard, settings=settings, traces=False)
    try:
        names = [f"hospital-{number:02d}" for number in range(1, options.hospitals + 1)]
        chunks.mkdir(mode=0o700, parents=True)
        with console.status("Starting PostgreSQL, Redis, the four services and the hospitals ..."):
            stack.start()
            stack.found(names)
            stack.start_hospitals(
                ((name, _hospital(stack, number, name)) for number, name in enumerate(names)), module="bench.hospital"
            )
        return _measure(options, console, stack, plan, layout, kernels, names, port)
    finally:
        with console.status("Stopping everything ..."):
            stack.stop()
            guard.close()


def _data_file(stack: Stack, name: str) -> Path:
    return stack.folder / "vectors" / name / "vector.json"


def _hospital(stack: Stack, number: int, name: str) -> dict[str, Any]:
    path = _data_file(stack, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seed": SEED, "hospital": number}), encoding="utf-8")
    return {
        "population": name,
        "data": {"file": str(path)},
        "privacy": {"allow_without_privacy": True},
        "limits": {"max_vector_length": 1 << 25, "max_state_mb": 1024},
    }


def _measure(
    options: BenchOptions,
    console: Console,
    stack: Stack,
    plan: PlanManifest,
    layout: Layout,
    kernels: Kernels,
    names: list[str],
    port: int,
) -> SecureSumReport:
    progress = Progress(tuple(names), plan.rounds.count)
    with View(console, f"fedmesh bench secure-sum: {options.params:,} integers, {len(names)} hospitals", None) as view:
        usage = asyncio.run(_drive(stack, plan, progress, view))
    rounds = progress.rounds[WARM_UP:]
    seconds = [(done.committed_at.ToDatetime() - done.sealed_at.ToDatetime()).total_seconds() for done in rounds]
    with console.status("Checking every hospital's sums ..."):
        exact = _exact(stack, progress, names, options)
    centre = {name: usage.cpu_s[name] / len(rounds) for name in SERVICES}
    report = SecureSumReport(
        params=options.params,
        hospitals=len(names),
        lanes=options.lanes,
        parameter_set=options.parameters,
        upload_bytes_per_parameter=layout.upload_bytes / options.params,
        download_bytes_per_parameter=layout.sum_bytes / options.params,
        round_s={"p50": float(np.quantile(seconds, 0.5)), "p99": float(np.quantile(seconds, 0.99))},
        phase_s=_phases(port),
        centre_cpu_s=sum(centre.values()),
        centre_cpu_by_service_s=centre,
        stores_cpu_s={name: usage.cpu_s[name] / len(rounds) for name in (stack.postgres.name, stack.redis.name)},
        centre_adding_cpu_s=usage.cpu_s[WORKERS] / len(rounds),
        hospital_cpu_s=sum(usage.cpu_s[name] for name in names) / len(names) / len(rounds),
        aggregator_peak_extra_mb=usage.aggregator_extra_mb,
        ciphertext_set_mb=layout.upload_bytes / 2**20,
        peak_process_mb=usage.peak_process_mb,
        add_over_bandwidth_bound=kernels.add_over_bandwidth_bound,
        exact=exact,
        rounds=len(rounds),
    )
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _print(console, report, kernels)
    return report


@dataclass(frozen=True)
class _Usage:
    """CPU seconds in the measured rounds by part; memory in MiB."""

    cpu_s: dict[str, float]
    aggregator_extra_mb: float
    peak_process_mb: float


async def _drive(stack: Stack, plan: PlanManifest, progress: Progress, view: View) -> _Usage:
    async with (
        stub(stack, "registry") as registry,
        stub(stack, "registry", stack.operator(APPROVER)) as second,
        stub(stack, "coordinator") as coordinator,
    ):
        plan_id = await prepare(registry, second, stack, plan, progress.hospitals)
        await all_connected(stack, coordinator, progress, view)
        job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=progress.hospitals)
        job_id = (await call(registry.CreateJob, job, patience_s=30)).job.job_id
        before: dict[str, float] = {}
        held_mb = 0.0

        async def changed(now: Progress) -> None:
            nonlocal held_mb
            view.show(now)
            if len(now.rounds) >= WARM_UP and not before:
                before.update(cpu_seconds(stack))
                # Now all workers have started: what each of them needs by itself is no matter of the data.
                held_mb = _reset_peak(families(stack)["aggregator"])

        await watch_job(registry, coordinator, job_id, progress, changed)
    if progress.job is None or progress.job.status != registry_pb2.JOB_STATUS_COMPLETED:
        reason = "" if progress.job is None else progress.job.reason
        raise FedmeshError(Code.INTERNAL, f"the benchmark's job did not complete: {reason}")
    after = cpu_seconds(stack)
    processes = families(stack)
    peak_mb = sum(_memory_mb(process, "VmHWM") for process in processes["aggregator"])
    largest = max(_memory_mb(process, "VmHWM") for family in processes.values() for process in family)
    return _Usage({name: after[name] - before.get(name, 0.0) for name in after}, max(0.0, peak_mb - held_mb), largest)


def _memory_mb(process: psutil.Process, field: str) -> float:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def _reset_peak(family: list[psutil.Process]) -> float:
    """Begin a new peak of memory; MiB that is held now."""
    for process in family:
        # proc(5): 5 resets the peak resident set size to the present one.
        with suppress(OSError):  # a worker that ended just now
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return sum(_memory_mb(process, "VmRSS") for process in family)


def _phases(port: int) -> dict[str, float]:
    """Mean seconds by phase from the coordinator's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for what, phase, value in _PHASE_LINE.findall(text):
        found.setdefault(phase, {})[what] = float(value)
    return {phase: each["sum"] / each["count"] for phase, each in found.items() if each.get("count")}


def _exact(stack: Stack, progress: Progress, names: list[str], options: BenchOptions) -> bool:
    numbers = {name: number for number, name in enumerate(names)}
    spare = spare_bits(parameter_set(options.parameters), options.lanes)
    noted = {name: noted_sums(_data_file(stack, name), PLAN) for name in names}
    for done in progress.rounds:
        contributors = [item.hospital_id for item in done.contributions]
        expected = np.zeros(options.params, dtype=np.int64)
        for name in contributors:
            expected += vector(SEED, numbers[name], done.version, options.params, options.lanes, spare)
        # A round is over once t hospitals agree: slower ones may not have decrypted it.
        seen = [noted[name][done.version] for name in contributors if done.version in noted[name]]
        if set(seen) != {sum_digest(expected)} or len(seen) < threshold(len(names)):
            return False
    return True


def _print(console: Console, report: SecureSumReport, kernels: Kernels) -> None:
    table = Table(
        title=f"Secure sum of {report.params:,} integers by {report.hospitals} hospitals, {report.rounds} rounds"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        "round, sealed to committed, p50": f"{report.round_s['p50']:.2f} s",
        "round, p99": f"{report.round_s['p99']:.2f} s",
        **{f"  phase {name}": f"{seconds:.2f} s" for name, seconds in report.phase_s.items() if name != "training"},
        "parameter set": report.parameter_set,
        "upload": f"{report.upload_bytes_per_parameter:.2f} bytes a value ({report.lanes} lane(s))",
        "download of the sum": f"{report.download_bytes_per_parameter:.2f} bytes a value",
        "CPU of the centre a round": f"{report.centre_cpu_s:.2f} s",
        "  of which reading and adding": f"{report.centre_adding_cpu_s:.2f} s",
        "CPU of a hospital a round": f"{report.hospital_cpu_s:.2f} s",
        "aggregator's peak beyond rest": f"{report.aggregator_peak_extra_mb:.0f} MiB "
        f"(one ciphertext set: {report.ciphertext_set_mb:.1f} MiB)",
        "largest process": f"{report.peak_process_mb:.0f} MiB",
        "adding, over memory bandwidth": f"{report.add_over_bandwidth_bound:.1f} x",
        "a segment: encrypt, mask, decrypt": _milliseconds(kernels.encrypt_s, kernels.mask_s, kernels.decrypt_s),
        f"  check one, add {report.hospitals}, unmask": _milliseconds(
            kernels.check_s, kernels.add_s, kernels.correct_s
        ),
        "every sum exact": "yes" if report.exact else "NO",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _milliseconds(*seconds: float) -> str:
    return " / ".join(f"{each * 1000:.1f}" for each in seconds) + " ms"
