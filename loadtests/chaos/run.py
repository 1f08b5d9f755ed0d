"""One run from beginning to end: rig, quiet, faults, quiet, judgement. Whatever happens, nothing is left running."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import registry_pb2

from loadtests.chaos.calls import STUBS
from loadtests.chaos.disks import own_namespace
from loadtests.chaos.faults import Fault, Skipped, chosen, wait_whole
from loadtests.chaos.faults_network import ALL
from loadtests.chaos.figures import SLOW_MS, Figures, Window, judge, measure
from loadtests.chaos.ledger import Findings
from loadtests.chaos.mesh import ChaosMesh
from loadtests.chaos.priority import MEASURING_NICE, at_nice
from loadtests.chaos.probe import CREATE
from loadtests.chaos.programs import find_programs
from loadtests.chaos.reading import judge as judge_ledger
from loadtests.chaos.reading import read_stored, read_truth
from loadtests.chaos.records import Appender, read_calls, rows
from loadtests.chaos.redis_cluster import MASTER_NAME
from loadtests.chaos.report import write_report
from loadtests.chaos.settings import Options, Targets
from loadtests.peers.percentiles import percentile
from services.bench.secure_sum import BenchOptions, bench_plan
from services.common.config import TlsConfig, read_secret
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.embedded.guard import Guard
from services.embedded.processes import wait_until, write_private
from services.embedded.supervisor import ChildSpec
from services.plans.manifest import PlanManifest, canonical_bytes
from services.secure_sum.roster import read_roster_file

Say = Callable[[str], None]
# A round of the secure sum that needs one ciphertext segment.
PARAMS: Final = 2048
_WARM_S: Final = 3.0
OPERATORS: Final = ("operator", "second-operator")
# Between a fault's end and the next one.
SETTLE_S: Final = 4.0
WHOLE_S: Final = 180.0
DRAIN_S: Final = 120.0


def say(text: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Run:
    """See the module. `truth` holds the ledger: calls, acknowledgements, rounds, probes, faults."""

    def __init__(self, options: Options, mesh: ChaosMesh) -> None:
        self.options = options
        self.mesh = mesh
        self.truth = mesh.folder / "truth"
        self._made_before = 0
        self.clients = tuple(f"client-{number:03d}" for number in range(1, options.clients + 1))

    def execute(self) -> Findings:
        """Raises: FedmeshError when something did not start or did not come back."""
        faults = chosen(self.options.faults, ALL)
        mesh = self.mesh
        say("starting PostgreSQL under Patroni, Redis under Sentinels, ten services")
        mesh.prepare()
        mesh.start()
        say(f"starting {len(mesh.hospitals)} hospitals, which run rounds, and the load: {self.options.rate:g} calls/s")
        mesh.start_hospitals()
        job_id, plan = asyncio.run(self._found())
        with mesh.postgres.connect() as connection:
            connection.execute(CREATE)
        self._start_probe()
        self._start_load(job_id, plan)
        self._warm_up()
        self._quiet(self.options.quiet_s)
        with Appender(self.truth / "faults.jsonl") as log:
            for turn in range(self.options.repeats):
                for fault in faults:
                    self._strike(fault, turn, log)
        self._wait_for_calls()
        self._drain()
        say("comparing what was acknowledged with what is stored")
        return judge_ledger(mesh, PARAMS, plan.encoding.lanes)

    # ---- before

    async def _found(self) -> tuple[str, PlanManifest]:
        """Register everybody, publish the roster, have a plan approved, and start the job."""
        options = BenchOptions(folder=self.mesh.folder, params=PARAMS, hospitals=len(self.mesh.hospitals), rounds=9_000)
        plan = _hurried(bench_plan(options))
        first, second = (self.mesh.ca.issue_operator(name) for name in OPERATORS)
        target = self.mesh.addresses.target("registry")
        async with MeshChannel(target, first) as one, MeshChannel(target, second) as two:
            registry, other = one.stub(STUBS["registry"]), two.stub(STUBS["registry"])
            for name in (*self.mesh.hospitals, *self.clients):
                hospital = registry_pb2.RegisterHospitalRequest(
                    request_id=new_id(), hospital_id=name, display_name=name
                )
                await call(registry.RegisterHospital, hospital, patience_s=60)
            statement, signatures = read_roster_file(self.mesh.roster_file)
            signed = [round_pb2.Signature(hospital_id=name, signature=value) for name, value in signatures.items()]
            roster = registry_pb2.PublishRosterRequest(request_id=new_id(), statement=statement, signatures=signed)
            await call(registry.PublishRoster, roster, patience_s=60)
            proposal = registry_pb2.CreatePlanRequest(request_id=new_id(), manifest=canonical_bytes(plan))
            plan_id = (await call(registry.CreatePlan, proposal, patience_s=60)).plan.plan_id
            await call(
                other.ApprovePlan,
                registry_pb2.ApprovePlanRequest(request_id=new_id(), plan_id=plan_id),
                patience_s=60,
            )
            await self._all_connected(first)
            job = registry_pb2.CreateJobRequest(request_id=new_id(), plan_id=plan_id, hospital_ids=self.mesh.hospitals)
            return (await call(registry.CreateJob, job, patience_s=60)).job.job_id, plan

    async def _all_connected(self, operator: TlsConfig) -> None:
        async with MeshChannel(self.mesh.addresses.target("coordinator"), operator) as channel:
            coordinator, deadline = channel.stub(STUBS["coordinator"]), time.monotonic() + 300
            while True:
                request = coordinator_pb2.ListParticipantsRequest()
                answer = await call(coordinator.ListParticipants, request, patience_s=60)
                missing = set(self.mesh.hospitals) - {item.hospital_id for item in answer.participants}
                if not missing:
                    return
                if time.monotonic() > deadline:
                    raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"not connected in time: {', '.join(sorted(missing))}")
                await asyncio.sleep(0.5)

    def _start_probe(self) -> None:
        redis = self.mesh.redis.config("coordinator")
        password = self.mesh.redis.password("admin")
        self._start(
            "probe",
            {
                "truth": str(self.truth),
                "conninfo": psycopg.conninfo.make_conninfo(
                    self.mesh.postgres.dsn("postgres"),
                    password=read_secret(self.mesh.postgres.password_file("postgres")),
                ),
                "redis": {
                    "username": "admin",
                    "password": password,
                    "master": MASTER_NAME,
                    "sentinels": [item.rsplit(":", 1) for item in (redis.sentinel.addresses if redis.sentinel else ())],
                },
            },
        )

    def _start_load(self, job_id: str, plan: PlanManifest) -> None:
        tls = {
            "hospital": [self.mesh.ca.issue_hospital(name) for name in self.clients],
            "operator": [self.mesh.tls(f"operator-{OPERATORS[0]}")],
            "service": [self.mesh.tls("coordinator")],
        }
        self._start(
            "load",
            {
                "truth": str(self.truth),
                "rate": self.options.rate,
                "job_id": job_id,
                "manifest": canonical_bytes(plan).decode(),
                "targets": {name: self.mesh.addresses.target(name) for name in STUBS},
                "tls": {name: [item.model_dump(mode="json") for item in found] for name, found in tls.items()},
            },
        )

    def _start(self, name: str, config: dict[str, Any]) -> None:
        path = self.mesh.folder / "config" / f"{name}.json"
        write_private(path, json.dumps(config))
        argv = at_nice(MEASURING_NICE, [sys.executable, "-m", f"loadtests.chaos.{name}", "--config", str(path)])
        self.mesh.supervisor.start(ChildSpec(name=name, argv=argv, rank=3, grace_s=DRAIN_S))

    def _warm_up(self) -> None:
        """Until there are rounds and calls are answered in time; what came before is not measured.

        The first round also loads libraries, and all clients connect at once.
        """
        deadline = time.monotonic() + 180
        while sum(1 for _ in rows(self.truth / "rounds.jsonl")) < 2 or not self._in_time():
            self._require_running()
            if time.monotonic() > deadline:
                raise FedmeshError(
                    Code.SERVICE_UNAVAILABLE,
                    f"no round, or no call in time, for three minutes: lower --rate, or see {self.mesh.folder}/run",
                )
            time.sleep(0.5)
        self._made_before = self._made()
        with Appender(self.truth / "began.jsonl") as log:
            log.add(time.time())

    def _in_time(self) -> bool:
        """Whether nine in ten of the newest calls, of some seconds, were not slow."""
        newest = read_calls(self.truth / "calls.jsonl")[-int(_WARM_S * self.options.rate) :]
        return bool(newest) and percentile([item.latency_ms for item in newest], 0.9) < SLOW_MS

    # ---- the faults

    def _strike(self, fault: Fault, turn: int, log: Appender) -> None:
        began = time.time()
        try:
            broken = fault.strike(self.mesh, turn)
        except Skipped as reason:
            say(f"{fault.name}: SKIPPED, {reason}")
            log.add({"name": fault.name, "group": fault.group, "turn": turn, "skipped": str(reason)})
            return
        say(f"{fault.name}: {broken.target} ({turn + 1} of {self.options.repeats})")
        time.sleep(broken.hold_s)
        broken.mend()
        mended = time.time()
        if wait_whole(self.mesh, WHOLE_S) is None:
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE,
                f"{WHOLE_S:g} s after {fault.name} of {broken.target} not all is well: PostgreSQL "
                f"{self.mesh.postgres.members()}, Redis {self.mesh.redis.roles()}, not serving: "
                f"{[name for name in self.mesh.replicas if not self.mesh.serves(name)]}",
            )
        log.add(
            {
                "name": fault.name,
                "group": fault.group,
                "turn": turn,
                "target": broken.target,
                "writer": broken.writer,
                "start": began,
                "mended": mended,
                "whole": time.time(),
            }
        )
        self._require_running()
        time.sleep(SETTLE_S)

    # ---- waiting

    def _quiet(self, seconds: float) -> None:
        say(f"quiet for {seconds:g} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._require_running()
            time.sleep(min(5.0, max(0.0, deadline - time.monotonic())))

    def _made(self) -> int:
        """Calls since the start, those before measuring included."""
        path = self.truth / "calls.jsonl"
        return sum(1 for _ in path.open("rb")) if path.exists() else 0

    def _wait_for_calls(self) -> None:
        """Quiet until there were enough calls."""
        while (made := self._made() - self._made_before) < self.options.calls:
            say(f"{made:,} of {self.options.calls:,} calls")
            self._quiet(min(60.0, 1.0 + (self.options.calls - made) / self.options.rate))

    def _drain(self) -> None:
        """End the load and the rounds, and wait until everything is where it belongs."""
        say("ending the load, and waiting until everything acknowledged is in its place")
        self.mesh.supervisor.stop("load")
        self.mesh.supervisor.stop("probe")
        asyncio.run(self._end_jobs())
        if not wait_until(self._settled, DRAIN_S, interval_s=0.5):
            say("not everything has settled: the comparison will say what")

    async def _end_jobs(self) -> None:
        """Hospitals stop where they are; what they have signed and charged is reported all the same."""
        async with MeshChannel(
            self.mesh.addresses.target("registry"), self.mesh.tls(f"operator-{OPERATORS[0]}")
        ) as one:
            registry = one.stub(STUBS["registry"])
            running = registry_pb2.ListJobsRequest(status=registry_pb2.JOB_STATUS_RUNNING)
            for job in (await call(registry.ListJobs, running, patience_s=60)).jobs:
                end = registry_pb2.EndJobRequest(
                    request_id=new_id(),
                    job_id=job.job_id,
                    status=registry_pb2.JOB_STATUS_CANCELLED,
                    reason="the run is over",
                )
                await call(registry.EndJob, end, patience_s=60)

    def _settled(self) -> bool:
        """Whether the audit log has all of the outbox, and the registry the hospitals' whole ledgers, for a while."""
        seen = []
        for _ in range(2):
            with self.mesh.postgres.connect() as connection:
                stored = read_stored(connection, 0)
            truth = read_truth(self.mesh)
            ledgers = {name: hospital.ledger for name, hospital in truth.hospitals.items()}
            if stored.outbox_waiting or any(stored.ledgers.get(name, ()) != own for name, own in ledgers.items()):
                return False
            seen.append((len(stored.entries), ledgers))
            time.sleep(2.0)
        return seen[0] == seen[1]

    def _require_running(self) -> None:
        """Raises: FedmeshError(INTERNAL) when a part of the rig itself has ended."""
        for child in self.mesh.supervisor.ended():
            if child.name in ("load", "probe", "network", "etcd", *self.mesh.hospitals):
                raise FedmeshError(Code.INTERNAL, f"{child.name} has ended; see {child.log}")


def _hurried(plan: PlanManifest) -> PlanManifest:
    """The plan with deadlines for a machine that is next door: a phase that loses somebody goes on soon."""
    limits = plan.rounds.model_copy(update={"ready_deadline_s": 30.0, "phase_deadline_s": 15.0})
    return plan.model_copy(update={"rounds": limits})


def run_chaos(options: Options) -> Figures:
    """Run, and write the report. Nothing is left running. Raises: FedmeshError."""
    programs = find_programs(say)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    disks = own_namespace()
    guard = Guard()
    hospitals = [f"hospital-{number:02d}" for number in range(1, options.hospitals + 1)]
    mesh = ChaosMesh(options.folder, programs, hospitals, guard, disks=disks)
    try:
        findings = Run(options, mesh).execute()
    finally:
        say("stopping everything")
        mesh.stop()
        guard.close()
    return conclude(options, mesh.folder / "truth", findings)


def conclude(options: Options, truth: Path, findings: Findings) -> Figures:
    """Figures, judgement and report from the files of a run."""
    began = max((row[0] for row in rows(truth / "began.jsonl")), default=0.0)
    calls = sorted((item for item in read_calls(truth / "calls.jsonl") if item.at >= began), key=lambda item: item.at)
    struck = [row[0] for row in rows(truth / "faults.jsonl")]
    windows = [
        Window(row["name"], row["group"], row["target"], row["writer"], row["start"], row["whole"])
        for row in struck
        if "skipped" not in row
    ]
    skipped = {row["name"]: row["skipped"] for row in struck if "skipped" in row}
    writes = {name: [float(row[0]) for row in rows(truth / f"{name}.jsonl")] for name in ("postgres", "redis")}
    figures = measure(calls, windows, writes, [float(row[0]) for row in rows(truth / "rounds.jsonl")], skipped)
    figures.lost, figures.doubled, figures.inexact = findings.lost, findings.doubled, findings.inexact
    figures.notes, figures.checked = findings.notes, findings.checked
    figures.notes += [f"job {row[1]} ended by itself: {row[2]} {row[3]}" for row in rows(truth / "jobs.jsonl")]
    figures.machine = describe_machine()
    figures.options = {"rate": options.rate, "hospitals": options.hospitals, "clients": options.clients}
    figures.missed = judge(figures, options, Targets())
    report = options.report or options.folder / "report.json"
    for path in write_report(report, figures, calls, windows, Targets()):
        say(f"written: {path}")
    return figures


def describe_machine() -> dict[str, str]:
    """Processor, cores and memory, and what else had work for them when this was asked."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "processor": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": os.uname().release.split("-")[0],
        "load average": f"{os.getloadavg()[0]:.1f}",
    }
