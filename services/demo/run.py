"""Runs the demonstration: a stack, fifteen hospital processes, one job, and the comparison at the end."""

import asyncio
import concurrent.futures
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console

from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.files import require_writable
from services.common.grpc.client import call, stream
from services.common.ids import new_id
from services.demo import datasets, heart
from services.demo.comparison import Comparison, compare
from services.demo.datasets import DemoData
from services.demo.guarantee import hospital_privacy, lowered_guarantee
from services.demo.personal import personal_models
from services.demo.progress import Progress, watch_job
from services.demo.promotion import Promotion, promote, pull
from services.demo.report import PrivacyFacts, Report, Results, write_predictions, write_report
from services.demo.summary import print_summary
from services.demo.view import View
from services.embedded.guard import Guard
from services.embedded.memory import PeakMemory
from services.embedded.stack import COMPILER, Stack
from services.hospital_node.noise import training_noise
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes
from services.plans.variants import with_colluders
from services.privacy.noise import Guarantee
from services.secure_sum.roster import load_roster_file, read_roster_file
from services.transparency.checkpoint import VerifierKey, open_checkpoint, parse_verifier_key

PROPOSER: Final = "operator"
APPROVER: Final = "second-operator"
# Fifteen processes that load TensorFlow may share one slow core; one that ends is noticed at once.
STARTUP_PATIENCE_S: Final = 300.0
AUDIT_LOOK_S: Final = 1.0
AUDIT_MOST_LOOKS: Final = 20
# The kernel walks the page tables of all processes: some 0.15 s of a core each time.
MEMORY_LOOK_S: Final = 2.0


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chose. privacy: the epsilon, or None for a run without. seeds: how many runs.
    colluders: f of the guarantee; None: as many as the hospitals tolerate."""

    folder: Path
    data: Path | None = None
    dataset: str = datasets.SYNTHETIC
    hospitals: int = 15
    privacy: float | None = 0.5
    rounds: int | None = None
    report: Path | None = None
    predictions: Path | None = None
    seeds: int = 1
    colluders: int | None = None


@dataclass(frozen=True)
class _Run:
    """One finished run."""

    data: DemoData
    report: Report
    found: Comparison


def choose_plan(options: DemoOptions) -> PlanManifest:
    """The shipped plan for the data, with or without privacy, at the asked epsilon, f and number of rounds.

    Raises: FedmeshError: PLAN_INVALID for an epsilon or a number of rounds that no plan may have, or an f without
        privacy; PRIVACY_REFUSED for heart data with privacy.
    """
    plan = shipped_plan(_plan_name(options))
    changed = json.loads(canonical_bytes(plan))
    if options.privacy is not None:
        changed["privacy"]["epsilon"] = options.privacy
        if changed["metrics"] is not None:
            changed["metrics"]["epsilon"] = options.privacy
    if options.rounds is not None:
        changed["rounds"]["count"] = options.rounds
        if options.rounds == 1:
            # The only round has to train: none is left to measure.
            changed["checks"] = None
    return with_colluders(validate(PlanManifest, changed, f"plan {plan.name}", Code.PLAN_INVALID), options.colluders)


def default_privacy(data: Path | None) -> float | None:
    """The epsilon of a run that does not state one: 0.5, but none on the public heart data, whose plan has none."""
    return None if data is not None and heart.is_heart(data) else 0.5


def _plan_name(options: DemoOptions) -> str:
    if options.data is not None and heart.is_heart(options.data):
        if options.privacy is not None:
            raise FedmeshError(
                Code.PRIVACY_REFUSED,
                "the heart plan scales by each hospital's own data, which no noise covers: use --privacy none",
            )
        return "heart-logistic"
    return "readmission-logistic" if options.privacy is None else "readmission-logistic-private"


def prepare_data(options: DemoOptions, plan: PlanManifest, say: Callable[[str], None], seed: int = 0) -> DemoData:
    """The data to train on: given, made, or fetched. Raises: as the functions of `datasets`."""
    if options.data is not None and heart.is_heart(options.data):
        return datasets.heart_hospitals(options.data, options.folder / "data" / datasets.HEART, plan, seed)
    if options.data is not None:
        return datasets.from_folder(options.data, plan)
    # A folder each: one kind must not be taken for the other.
    folder = options.folder / "data" / options.dataset
    if options.dataset == datasets.DIABETES130:
        return datasets.fetch_openml(folder, plan, say)
    return datasets.synthetic(folder, options.hospitals)


def run_demo(options: DemoOptions, console: Console) -> Results:
    """Run the whole demonstration, once for each seed, and return what it found. Nothing is left running.

    Raises: FedmeshError: bad options or data, a part that did not start, or a failed job (INTERNAL).
    """
    require_writable(options.report, options.predictions)
    plan = choose_plan(options)
    reports = []
    for seed in range(options.seeds):
        if options.seeds > 1:
            console.rule(f"run {seed + 1} of {options.seeds}")
        run = _run_once(options, console, plan, seed)
        reports.append(run.report)
    results = Results(tuple(reports))
    if options.report is not None:
        write_report(results, options.report)
    if options.predictions is not None:
        write_predictions(options.predictions, run.found.test, run.found.probability)
    write_report(results, options.folder / "report.json")
    print_summary(console, results, options.folder, run.data)
    return results


def _run_once(options: DemoOptions, console: Console, plan: PlanManifest, seed: int) -> _Run:
    """One run on a stack made anew, with ledgers of its own. Whatever happens, nothing is left running."""
    started = time.monotonic()
    # What is wrong with the data, or with the way to it, is said before the last demonstration is thrown away.
    with console.status("Preparing the data ..."):
        data = prepare_data(options, plan, lambda text: console.print(text), seed)
        lowered = lowered_guarantee(plan, len(data.hospitals))
    folder = options.folder.absolute()
    Stack(folder / "stack").destroy()
    guard = Guard()
    stack = Stack(folder / "stack", guard=guard)
    try:
        # Before anything is started: the compiler and the stores count too.
        with PeakMemory(lambda: [os.getpid(), *stack.pids()], interval_s=MEMORY_LOOK_S) as memory:
            with console.status("Preparing PostgreSQL, Redis and the four services ..."):
                # The compiler needs a core for some 15 s, the stores mostly wait: they go side by side.
                stack.precompile(canonical_bytes(plan))
                stack.start()
            console.print(f"Data: {data.description}; {len(data.hospitals)} hospitals. Plan: {plan.name}.")
            if lowered:
                console.print(lowered, highlight=False)
            return _train_and_compare(options, console, stack, data, plan, started, memory)
    finally:
        with console.status("Stopping everything ..."):
            stack.stop()
            guard.close()


def _train_and_compare(
    options: DemoOptions,
    console: Console,
    stack: Stack,
    data: DemoData,
    plan: PlanManifest,
    started: float,
    memory: PeakMemory,
) -> _Run:
    ids = _hospital_ids(data)
    stack.found(ids)
    stack.start_hospitals(
        (name, _hospital_settings(stack.folder, data, name, value, plan)) for name, value in ids.items()
    )
    progress = Progress(tuple(ids), plan.rounds.count)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as reader:
        # The harness reads the hospitals' files for the comparison while they train.
        reading = reader.submit(read_all, data, plan)
        title = f"fedmesh demo: {plan.name} at {len(ids)} hospitals, {data.name}"
        with View(console, title, _spent_after(plan, len(ids))) as view:
            driven = asyncio.run(_drive(stack, plan, progress, view, started))
        with console.status("Comparing with each hospital alone ..."):
            trained = asyncio.run(_collect(stack, driven.job_id, progress.hospitals[0]))
            own = None if plan.personalisation is None else personal_models(stack, ids, driven.job_id, trained.version)
            accurate = data.judged_by_accuracy
            found = compare(plan, reading.result(), trained.state, own, judged_by_accuracy=accurate)
            memory.sample()
            promotion = driven.promotion
            if promotion is not None and promotion.promoted:
                promotion = asyncio.run(pull(stack, plan, progress.hospitals[0], promotion))
    driven = replace(driven, promotion=promotion)
    processes = sum(part.running for part in stack.status() if part.name != COMPILER)
    wall_s = time.monotonic() - started
    return _Run(data, _report(data, plan, progress, driven, trained, found, wall_s, memory.peak_mb, processes), found)


def _report(
    data: DemoData,
    plan: PlanManifest,
    progress: Progress,
    driven: "_Driven",
    trained: "_Trained",
    found: Comparison,
    wall_s: float,
    peak_mb: float,
    processes: int,
) -> Report:
    hospitals = len(progress.hospitals)
    return Report(
        dataset=data.name,
        hospitals=hospitals,
        plan=plan.name,
        job_id=driven.job_id,
        rounds=len(progress.rounds),
        burnt_rounds=sum(done.burnt for done in progress.rounds),
        model_version=trained.version,
        test=found.scores,
        local_only=found.local_only,
        privacy=_privacy_facts(plan, hospitals, progress),
        wall_s=wall_s,
        startup_s=driven.startup_s,
        round_overhead_s=_overheads(progress),
        peak_memory_mb=peak_mb,
        upload_bytes=max(done.upload_bytes for done in progress.rounds),
        parameters=plan.vector_length,
        processes=processes,
        audit_entries=trained.audit_entries,
        personal_models=found.personal_models,
        promotion=driven.promotion,
    )


def _hospital_ids(data: DemoData) -> dict[str, str]:
    """Hospital names by partition value: `hospital-07` for 7."""
    return {f"hospital-{value.zfill(2).lower()}": value for value in data.hospitals}


def _hospital_settings(
    folder: Path, data: DemoData, hospital_id: str, value: str, plan: PlanManifest
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "population": f"{data.name}-{value.lower()}",
        "data": {
            "file": str(data.encounters),
            "partition": {"file": str(data.partition), "hospital": value},
        },
    }
    settings["privacy"] = hospital_privacy(folder, plan, hospital_id, settings["population"])
    return settings


@dataclass(frozen=True)
class _Driven:
    """A job that went through all its rounds. startup_s: until it was started. promotion: None without checks."""

    job_id: str
    startup_s: float
    promotion: Promotion | None


async def _drive(stack: Stack, plan: PlanManifest, progress: Progress, view: View, started: float) -> _Driven:
    """Register, propose, approve, start, follow the job to its end, promote its last version if the plan has checks."""
    view.show(progress)
    async with (
        stub(stack, "registry") as registry,
        stub(stack, "registry", stack.operator(APPROVER)) as second,
        stub(stack, "coordinator") as coordinator,
    ):
        plan_id = await prepare(registry, second, stack, plan, progress.hospitals)
        await all_connected(stack, coordinator, progress, view)
        startup_s = time.monotonic() - started
        job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=progress.hospitals)
        job_id = (await call(registry.CreateJob, job, patience_s=30)).job.job_id

        async def changed(now: Progress) -> None:
            view.show(now)

        await watch_job(registry, coordinator, job_id, progress, changed)
    if progress.job is not None and progress.job.status != registry_pb2.JOB_STATUS_COMPLETED:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(progress.declined.items()))
        raise FedmeshError(Code.INTERNAL, f"the job did not complete: {progress.job.reason} {reasons}".strip())
    return _Driven(job_id, startup_s, await _promote(stack, plan, job_id, progress, view))


async def _promote(stack: Stack, plan: PlanManifest, job_id: str, progress: Progress, view: View) -> Promotion | None:
    if plan.checks is None:
        return None

    def waiting(reported: int) -> None:
        progress.note = f"{reported} of {len(progress.hospitals)} hospitals have signed their checks"
        view.show(progress)

    return await promote(stack, plan, job_id, len(progress.hospitals), (PROPOSER, APPROVER), waiting)


async def prepare(registry: Any, second: Any, stack: Stack, plan: PlanManifest, hospital_ids: Sequence[str]) -> str:
    """Register the hospitals, publish their roster, propose the plan and have a second person approve it: its id."""
    for name in hospital_ids:
        hospital = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=name, display_name=name)
        await call(registry.RegisterHospital, hospital, patience_s=30)
    statement, signatures = read_roster_file(stack.roster_file)
    roster = registry_pb2.PublishRosterRequest(
        request_id=new_id(),
        statement=statement,
        signatures=[
            round_pb2.Signature(hospital_id=name, signature=signature) for name, signature in signatures.items()
        ],
    )
    await call(registry.PublishRoster, roster, patience_s=30)
    return await approved(registry, second, plan)


async def approved(registry: Any, second: Any, plan: PlanManifest) -> str:
    """Propose a plan and have a second person approve it: its id."""
    proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=canonical_bytes(plan))
    plan_id: str = (await call(registry.CreatePlan, proposal, patience_s=30)).plan.plan_id
    approval = registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id)
    await call(second.ApprovePlan, approval, patience_s=30)
    return plan_id


async def all_connected(stack: Stack, coordinator: Any, progress: Progress, view: View) -> None:
    """Wait until every hospital is connected. Raises: FedmeshError(INTERNAL, SERVICE_UNAVAILABLE)."""
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

    The centre has only sealed states. The harness, which runs on the hospitals' machine, opens this one with the keys
    of one of them.
    """
    async with stub(stack, "registry") as registry, stub(stack, "audit") as audit:
        version = (
            await call(registry.GetModelVersion, registry_pb2.GetModelVersionRequest(job_id=job_id), patience_s=30)
        ).model_version
        request = registry_pb2.DownloadBlobRequest(sha256=version.state_sha256)
        blob = b"".join([part.chunk async for part in stream(registry.DownloadBlob, request, timeout_s=60)])
        state = _open_state(stack, hospital_id, job_id, version.version, blob)
        verifier = parse_verifier_key(stack.audit_verifier.read_text(encoding="utf-8").strip())
        return _Trained(version.version, state, await _settled_size(audit, verifier))


def _open_state(stack: Stack, hospital_id: str, job_id: str, version: int, blob: bytes) -> bytes:
    from services.hospital_node.store.epochs import EPOCH_FOLDER, load_epoch
    from services.hospital_node.usecases.states import open_newest
    from services.secure_sum import sealed

    roster = load_roster_file(stack.roster_file)
    epoch = sealed.sealed_epoch(blob)
    keys = load_epoch(stack.hospital_data(hospital_id) / EPOCH_FOLDER, roster.sha256, epoch)
    if keys is None:
        raise FedmeshError(Code.NOT_FOUND, f"{hospital_id} does not have the keys of epoch {epoch}")
    # A burnt version has the state of the one before.
    return open_newest(keys, job_id, version, blob)[1]


async def _settled_size(audit: Any, verifier: VerifierKey) -> int:
    """Entries of the audit log once the registry's outbox has run dry: the size that stays the same for a while."""
    sizes: list[int] = []
    while len(sizes) < AUDIT_MOST_LOOKS and (len(sizes) < 3 or sizes[-1] != sizes[-3]):
        note = (await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest(), patience_s=30)).checkpoint
        sizes.append(open_checkpoint(note, verifier).size)
        await asyncio.sleep(AUDIT_LOOK_S)
    return sizes[-1]


def read_all(data: DemoData, plan: PlanManifest) -> list[Dataset]:
    """The data sets of all hospitals, as these read them."""
    return [
        read_dataset(data.encounters, plan, partition=PartitionFile(path=data.partition, hospital=value))
        for value in data.hospitals
    ]


def _spent_after(plan: PlanManifest, hospitals: int) -> Callable[[int], Guarantee] | None:
    return None if plan.privacy is None else training_noise(plan, hospitals).guarantee_after


def _privacy_facts(plan: PlanManifest, hospitals: int, progress: Progress) -> PrivacyFacts | None:
    if plan.privacy is None:
        return None
    noise = training_noise(plan, hospitals)
    attempts = sum(done.attempt.attempt for done in progress.rounds)
    return PrivacyFacts(noise.guarantee, noise.guarantee_after(attempts), attempts)


def _overheads(progress: Progress) -> tuple[float, ...]:
    return tuple(
        (done.committed_at.ToDatetime() - done.sealed_at.ToDatetime()).total_seconds() for done in progress.rounds
    )
