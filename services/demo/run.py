"""Runs the demonstration: a stack, fifteen hospital processes, one job, and the comparison at the end."""

import asyncio
import concurrent.futures
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console

from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call, stream
from services.common.ids import new_id
from services.demo import datasets
from services.demo.datasets import DemoData
from services.demo.evaluation import local_only, pooled_test, score
from services.demo.progress import Progress, watch_job
from services.demo.report import PrivacyFacts, Report, print_summary, write_predictions, write_report
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.memory import PeakMemory
from services.embedded.stack import COMPILER, Stack
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.usecases.states import open_newest
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes
from services.secure_sum.sealed import sealed_epoch
from services.transparency.checkpoint import VerifierKey, open_checkpoint, parse_verifier_key

PROPOSER: Final = "operator"
APPROVER: Final = "second-operator"
STARTUP_PATIENCE_S: Final = 120.0
AUDIT_LOOK_S: Final = 1.0
AUDIT_MOST_LOOKS: Final = 20


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chose. privacy: the epsilon, or None for a run without."""

    folder: Path
    data: Path | None = None
    dataset: str = datasets.SYNTHETIC
    hospitals: int = 15
    privacy: float | None = 0.5
    rounds: int | None = None
    report: Path | None = None
    predictions: Path | None = None


def choose_plan(options: DemoOptions) -> PlanManifest:
    """The shipped readmission plan, with or without privacy, at the asked epsilon and number of rounds.

    Raises: FedmeshError(PLAN_INVALID) for an epsilon or a number of rounds that no plan may have.
    """
    plan = shipped_plan("readmission-logistic" if options.privacy is None else "readmission-logistic-private")
    changed = json.loads(canonical_bytes(plan))
    if options.privacy is not None:
        changed["privacy"]["epsilon"] = options.privacy
        if changed["metrics"] is not None:
            changed["metrics"]["epsilon"] = options.privacy
    if options.rounds is not None:
        changed["rounds"]["count"] = options.rounds
    return validate(PlanManifest, changed, f"plan {plan.name}", Code.PLAN_INVALID)


def choose_data(options: DemoOptions, say: Callable[[str], None]) -> DemoData:
    """The data that the options name. Raises: as the functions of `datasets`."""
    if options.data is not None:
        return datasets.from_folder(options.data)
    if options.dataset == datasets.DIABETES130:
        return datasets.fetch_openml(options.folder / "data", say)
    return datasets.synthetic(options.folder / "data", options.hospitals)


def run_demo(options: DemoOptions, console: Console) -> Report:
    """Run the whole demonstration and return its report. Whatever happens, nothing is left running.

    Raises: FedmeshError: bad options or data, a part that did not start, or a failed job (INTERNAL).
    """
    started = time.monotonic()
    for path in (options.report, options.predictions):
        _require_writable(path)
    plan = choose_plan(options)
    folder = options.folder.absolute()
    Stack(folder / "stack").destroy()
    guard = Guard()
    stack = Stack(folder / "stack", guard=guard)
    try:
        with console.status("Preparing the data, PostgreSQL, Redis and the four services ..."):
            # The compiler needs a core for some 15 s, the stores mostly wait: they go side by side.
            stack.precompile(canonical_bytes(plan))
            data = choose_data(options, lambda text: console.print(text))
            stack.start()
        console.print(f"Data: {data.description}; {len(data.hospitals)} hospitals. Plan: {plan.name}.")
        # Walking the page tables of all processes costs the kernel some 0.2 s of a core: not too often.
        with PeakMemory(lambda: [os.getpid(), *stack.pids()], interval_s=4.0) as memory:
            return _train_and_compare(options, console, stack, data, plan, started, memory)
    finally:
        with console.status("Stopping everything ..."):
            stack.stop()
            guard.close()


def _require_writable(path: Path | None) -> None:
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: no such folder, or no permission")


def _train_and_compare(
    options: DemoOptions,
    console: Console,
    stack: Stack,
    data: DemoData,
    plan: PlanManifest,
    started: float,
    memory: PeakMemory,
) -> Report:
    ids = _hospital_ids(data)
    stack.start_hospitals((name, _hospital_settings(data, value, plan)) for name, value in ids.items())
    progress = Progress(tuple(ids), plan.rounds.count)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        # The harness reads the hospitals' files for the comparison while they train.
        reading = reader.submit(_read_all, data, plan)
        title = f"fedmesh demo: {plan.name} at {len(ids)} hospitals, {data.name}"
        with View(console, title, _epsilon_after(plan, len(ids))) as view:
            job_id, startup_s = asyncio.run(_drive(stack, plan, progress, view, started))
        with console.status("Comparing with each hospital alone ..."):
            trained = asyncio.run(_collect(stack, job_id, next(iter(ids))))
            sets = reading.result()
            test = pooled_test(sets)
            probability = _predict(plan, trained.state, test.x)
            report = Report(
                dataset=data.name,
                hospitals=len(ids),
                plan=plan.name,
                job_id=job_id,
                rounds=len(progress.rounds),
                model_version=trained.version,
                test=score(test.y, probability, test.patients),
                local_only=local_only(sets, test),
                privacy=_privacy_facts(plan, len(ids), progress),
                wall_s=time.monotonic() - started,
                startup_s=startup_s,
                round_overhead_s=_overheads(progress),
                peak_memory_mb=memory.peak_mb,
                upload_bytes=max(done.upload_bytes for done in progress.rounds),
                burnt_rounds=sum(done.burnt for done in progress.rounds),
                parameters=plan.vector_length,
                processes=sum(part.running for part in stack.status() if part.name != COMPILER),
                audit_entries=trained.audit_entries,
            )
    if options.report is not None:
        write_report(report, options.report)
    if options.predictions is not None:
        write_predictions(options.predictions, test, probability)
    write_report(report, options.folder / "report.json")
    print_summary(console, report, options.folder, data.description)
    return report


def _hospital_ids(data: DemoData) -> dict[str, str]:
    """Hospital names by partition value: `hospital-07` for 7."""
    return {f"hospital-{value.zfill(2).lower()}": value for value in data.hospitals}


def _hospital_settings(data: DemoData, value: str, plan: PlanManifest) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "population": f"{data.name}-{value.lower()}",
        "data": {
            "file": str(data.encounters),
            "partition": {"file": str(data.partition), "hospital": value},
        },
    }
    if plan.privacy is None:
        settings["privacy"] = {"allow_without_privacy": True}
    else:
        # Each demonstration has its own ledgers, made anew: the limit is what this run asks for.
        epsilon = max(0.5, plan.privacy.epsilon)
        settings["privacy"] = {"epsilon_limit": epsilon, "max_plan_epsilon": epsilon}
    return settings


async def _drive(stack: Stack, plan: PlanManifest, progress: Progress, view: View, started: float) -> tuple[str, float]:
    """Propose, approve, start, and follow the job to its end: (job id, seconds until it was started)."""
    view.show(progress)
    async with (
        stub(stack, "registry") as registry,
        stub(stack, "registry", stack.operator(APPROVER)) as second,
        stub(stack, "coordinator") as coordinator,
    ):
        proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=canonical_bytes(plan))
        plan_id = (await call(registry.CreatePlan, proposal, patience_s=30)).plan.plan_id
        approval = registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)
        await call(second.ApprovePlan, approval, patience_s=30)
        await _all_connected(stack, coordinator, progress, view)
        startup_s = time.monotonic() - started
        job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=progress.hospitals)
        job_id = (await call(registry.CreateJob, job, patience_s=30)).job.job_id

        async def changed(now: Progress) -> None:
            view.show(now)

        await watch_job(registry, coordinator, job_id, progress, changed)
    if progress.job is not None and progress.job.status != registry_pb2.JOB_STATUS_COMPLETED:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(progress.declined.items()))
        raise FedmeshError(Code.INTERNAL, f"the job did not complete: {progress.job.reason} {reasons}".strip())
    return job_id, startup_s


async def _all_connected(stack: Stack, coordinator: Any, progress: Progress, view: View) -> None:
    deadline = time.monotonic() + STARTUP_PATIENCE_S
    while True:
        answer = await call(
            coordinator.ListParticipants, coordinator_pb2.ListParticipantsRequest(), patience_s=STARTUP_PATIENCE_S
        )
        progress.connected = {participant.hospital_id for participant in answer.participants}
        view.show(progress)
        if set(progress.hospitals) <= progress.connected:
            return
        ended = [child for child in stack.supervisor.ended() if child.name in progress.hospitals]
        if ended:
            raise FedmeshError(
                Code.INTERNAL, f"{ended[0].name} ended at once: {_last_line(ended[0].log)} (log: {ended[0].log})"
            )
        if time.monotonic() > deadline:
            missing = ", ".join(sorted(set(progress.hospitals) - progress.connected))
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"not connected in time: {missing}; see `fedmesh status`")
        await asyncio.sleep(0.25)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "its log is empty"


@dataclass(frozen=True)
class _Trained:
    version: int
    state: bytes
    audit_entries: int


async def _collect(stack: Stack, job_id: str, hospital_id: str) -> _Trained:
    """The final state, and the size of the audit log.

    The centre holds the state only sealed. This harness opens it with the keys in one hospital's folder, as that
    hospital could by itself; nobody at the centre can.
    """
    async with stub(stack, "registry") as registry, stub(stack, "audit") as audit:
        job = (await call(registry.GetJob, registry_pb2.GetJobRequest(job_id=job_id), patience_s=30)).job
        if not job.state_sha256:
            raise FedmeshError(Code.INTERNAL, "every version was burnt: there is no model")
        request = registry_pb2.DownloadBlobRequest(sha256=job.state_sha256)
        sealed = b"".join([part.chunk async for part in stream(registry.DownloadBlob, request, timeout_s=60)])
        state = _open_at_hospital(stack.hospital_home(hospital_id), job, sealed)
        verifier = parse_verifier_key(stack.audit_verifier.read_text(encoding="utf-8").strip())
        return _Trained(job.version, state, await _settled_size(audit, verifier))


def _open_at_hospital(home: Path, job: registry_pb2.Job, sealed: bytes) -> bytes:
    keys = EpochFiles(home).load(job.roster_sha256, sealed_epoch(sealed))
    if keys is None:
        raise FedmeshError(Code.NOT_FOUND, f"{home.name} does not have the keys of the final state's epoch")
    return open_newest(keys, job.job_id, job.version, sealed)[1]


async def _settled_size(audit: Any, verifier: VerifierKey) -> int:
    """Entries of the audit log once the registry's outbox has run dry: the size that stays the same for a while."""
    sizes: list[int] = []
    while len(sizes) < AUDIT_MOST_LOOKS and (len(sizes) < 3 or sizes[-1] != sizes[-3]):
        note = (await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest(), patience_s=30)).checkpoint
        sizes.append(open_checkpoint(note, verifier).size)
        await asyncio.sleep(AUDIT_LOOK_S)
    return sizes[-1]


def _read_all(data: DemoData, plan: PlanManifest) -> list[Dataset]:
    return [
        read_dataset(data.encounters, plan, partition=PartitionFile(path=data.partition, hospital=value))
        for value in data.hospitals
    ]


def _predict(plan: PlanManifest, state: bytes, x: Any) -> Any:
    from services.hospital_node.training.trainer import predict

    return predict(plan, state, x)


def _noise_epsilon(plan: PlanManifest, hospitals: int) -> Callable[[int], float]:
    from services.privacy.noise import plan_noise

    assert plan.privacy is not None
    noise = plan_noise(
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        compositions=plan.rounds.count + plan.privacy.extra_attempts,
        sensitivity=plan.train_sensitivity,
        dimension=plan.train_length,
        hospitals=hospitals,
    )
    return noise.epsilon_after


def _epsilon_after(plan: PlanManifest, hospitals: int) -> Callable[[int], float] | None:
    return None if plan.privacy is None else _noise_epsilon(plan, hospitals)


def _privacy_facts(plan: PlanManifest, hospitals: int, progress: Progress) -> PrivacyFacts | None:
    from services.secure_sum.cohort import colluders

    if plan.privacy is None:
        return None
    attempts = sum(done.attempt.attempt for done in progress.rounds)
    return PrivacyFacts(
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        colluders=colluders(hospitals),
        spent=_noise_epsilon(plan, hospitals)(attempts),
        attempts=attempts,
    )


def _overheads(progress: Progress) -> tuple[float, ...]:
    return tuple(
        (done.committed_at.ToDatetime() - done.sealed_at.ToDatetime()).total_seconds()
        for done in progress.rounds
        if not done.burnt
    )
