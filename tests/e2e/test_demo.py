"""The demonstration from outside, as a person runs it: small, but with every real process."""

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import psutil
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from services.cli.main import app
from services.cli.mesh import awake, stub
from services.cli.witnesses import log_key
from services.common.clock import SystemClock
from services.common.errors import FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.common.tracing import ALLOWED
from services.embedded.stack import CONSORTIUM, SERVICES, Stack
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.usecases.witness import Witness
from services.secure_sum.roster import MemberKeys, load_roster_file
from services.transparency.checkpoint import open_checkpoint
from services.transparency.findings import HOSPITAL_CHECKS
from tests.support.command import FEDMESH

pytestmark = pytest.mark.timeout(900)
CHECKS = (
    *("privacy", "attestation", "quorum", "budget", "convergence", "divergence"),
    *HOSPITAL_CHECKS,
)


def fedmesh(*arguments: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*FEDMESH, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, **options)  # type: ignore[call-overload]
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done  # type: ignore[no-any-return]


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that have to do with a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words or str(process.info["cwd"] or "").startswith(str(folder)):
            found.append(words)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demonstration with privacy: four hospitals, three rounds."""
    folder = tmp_path_factory.mktemp("demo")
    done = fedmesh(
        *("demo", "--dir", folder, "--hospitals", 4, "--rounds", 3),
        *("--report", folder / "r.json", "--predictions", folder / "p.csv"),
    )
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_no_library_writes_to_the_terminal(finished: Path) -> None:
    """gRPC, TensorFlow and others log to standard error when something seems noteworthy to them."""
    assert (finished / "stderr.txt").read_text() == ""


def test_nothing_is_left_running(finished: Path) -> None:
    assert left_running(finished) == []


def test_the_report_has_every_field(finished: Path) -> None:
    report = json.loads((finished / "r.json").read_text())
    assert report["dataset"] == "synthetic"
    assert (report["hospitals"], report["rounds"], report["model_version"]) == (4, 3, 3)
    assert set(report["test"]) == {"auroc", "auprc", "brier", "recall_at_10pct", "n_encounters", "n_patients"}
    assert set(report["local_only"]) == {"auroc_mean", "auroc_weighted", "auprc_mean", "auprc_weighted"}
    assert report["privacy"]["unit"] == "patient"
    assert (report["privacy"]["epsilon"], report["privacy"]["delta"], report["privacy"]["colluders"]) == (0.5, 1e-6, 1)
    assert 0 < report["privacy"]["epsilon_spent"] <= 0.5
    for field in ("wall_s", "startup_s", "peak_memory_mb", "upload_bytes_per_parameter"):
        assert report[field] > 0
    assert 0 < report["round_overhead_s"]["p50"] <= report["round_overhead_s"]["p99"]
    assert report["processes"] == 4 + 4 + 2
    assert report["burnt_rounds"] == 0


def test_the_last_version_is_promoted_if_and_only_if_every_check_passed(finished: Path) -> None:
    """Whatever the noise was: it may make a check fail."""
    report = json.loads((finished / "r.json").read_text())
    promotion = report["promotion"]
    assert tuple(promotion["checks"]) == CHECKS
    for name, one in promotion["checks"].items():
        if one["value"] is not None:
            within = one["value"] >= one["limit"] if one["limit_is"] == "least" else one["value"] <= one["limit"]
            assert within == one["passed"], name
    assert promotion["checks"]["privacy"]["value"] == pytest.approx(report["privacy"]["epsilon_spent"])
    promoted = all(one["passed"] for one in promotion["checks"].values())
    people = (promotion["alias"], promotion["proposed_by"], promotion["approved_by"], promotion["pulled_by"])
    assert people == (("production", "operator", "second-operator", "hospital-00") if promoted else (None,) * 4)
    assert (finished / "stack/hospitals/hospital-00/model/model.npz").exists() == promoted


def test_the_predictions_give_the_reported_figures(finished: Path) -> None:
    """By another way: labels from the raw file, joined by encounter."""
    report = json.loads((finished / "r.json").read_text())
    scores = {row["encounter_id"]: float(row["score"]) for row in csv.DictReader((finished / "p.csv").open())}
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"select encounter_id, readmitted = '<30' from '{finished}/data/synthetic/diabetic_data.parquet' "
            f"join read_csv('{finished}/data/synthetic/partition15.csv', all_varchar = true) using (patient_nbr) "
            "where split = 'test' and discharge_disposition_id not in ('11', '13', '14', '19', '20', '21')"
        ).fetchall()
    assert {encounter for encounter, _label in rows} == set(scores)
    auroc = roc_auc_score([label for _e, label in rows], [scores[encounter] for encounter, _l in rows])
    assert auroc == pytest.approx(report["test"]["auroc"], abs=1e-6)
    assert report["test"]["n_encounters"] == len(rows)


def test_the_stopped_stack_can_be_looked_at(finished: Path) -> None:
    job = json.loads((finished / "r.json").read_text())["job_id"]
    assert job in fedmesh("jobs", "--dir", finished, env={**os.environ, "COLUMNS": "200"}).stdout
    assert left_running(finished) == []
    with awake(finished / "stack", SERVICES):
        assert "readmission-logistic" in inside("models", "--dir", finished)
        rounds = inside("rounds", "--dir", finished)
        assert rounds.count("hospital") >= 1
        assert "AUROC" in rounds
        assert inside("privacy", "ledger", "--dir", finished).count(job[:8]) == 4
        compared = inside("privacy", "reconcile", "--dir", finished)
        assert compared.count("equal") + compared.count("not reported yet") == 4
    assert left_running(finished) == []


def test_the_audit_log_has_every_step_and_verifies_offline(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    inside("audit", "export", "--out", out, "--dir", finished)
    assert "OK" in inside("audit", "verify", out, "--key", finished / "stack/keys/audit.vkey")
    types = [json.loads(json.loads(line)["leaf"])["type"] for line in (out / "entries.jsonl").read_text().splitlines()]
    counts = {name: types.count(name) for name in set(types)}
    assert counts["hospital.registered"] == 4
    assert counts["plan.proposed"] == counts["plan.approved"] == counts["job.created"] == 1
    assert (counts["roster.published"], counts["epoch.published"]) == (1, 1)
    before = ("attempt.opened", "round.sealed", "round.shared", "survivors.confirmed", "masks.opened", "sum.computed")
    for step in (*before, "round.agreed", "round.finalized", "round.committed"):
        assert counts[step] == 3, step
    assert counts["contribution.accepted"] == 12
    entries = (out / "entries.jsonl").read_bytes()
    (out / "entries.jsonl").write_bytes(entries.replace(b"round.sealed", b"round.sEaled", 1))
    refused = fedmesh("audit", "verify", out, check=False)
    assert refused.returncode == 1
    assert "entries.jsonl" in refused.stderr


async def witness_all(stack: Stack) -> None:
    """What the hospitals' nodes do by themselves, until all have cosigned the end of the log."""
    async with asyncio.timeout(120), stub(stack, "audit") as audit:
        size = -1
        while size != (size := await log_size(stack, audit)):
            for name in load_roster_file(stack.roster_file).ids:
                await witness_up_to(stack, name, size)


async def log_size(stack: Stack, audit: Any) -> int:
    note = (await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest())).checkpoint
    return open_checkpoint(note, log_key(stack)).size


async def witness_up_to(stack: Stack, name: str, size: int) -> None:
    memory = SqliteNodeState(stack.hospital_data(name)).witness
    verifier, keys = log_key(stack), MemberKeys.load(stack.member_keys(name))
    async with MeshChannel(stack.target("audit"), stack.hospital_tls(name)) as channel:
        witness = Witness(GrpcAuditLog(channel, 10.0), memory, keys, CONSORTIUM, verifier, SystemClock(), 4)
        while not ((held := memory.held(str(verifier))) and held.cosigned and held.size >= size):
            try:
                assert await witness.look() in ("cosigned", "current")
            except FedmeshError as error:
                # A service that has just started does not know yet which hospitals to let in.
                if not error.retryable:
                    raise
            await asyncio.sleep(0.1)


def inside(*arguments: object) -> str:
    """What a command prints, run in this process: starting one costs more than most of them."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.output.split())


async def cry_wolf(stack: Stack) -> None:
    """An alarm of a hospital that saw nothing wrong: to be shown all the same."""
    async with MeshChannel(stack.target("audit"), stack.hospital_tls("hospital-01")) as channel:
        audit = channel.stub(audit_pb2_grpc.AuditServiceStub)
        seen = (await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest())).checkpoint
        request = audit_pb2.RaiseAlarmRequest(
            request_id=new_id(),
            kind=audit_pb2.ALARM_KIND_FORK,
            held_checkpoint=seen,
            seen_checkpoint=seen,
            reason="[red]",
        )
        await call(audit.RaiseAlarm, request)


def test_the_log_is_witnessed_and_checked_with_files_alone(finished: Path, tmp_path: Path) -> None:
    roster, key = finished / "stack/keys/roster.json", finished / "stack/keys/audit.vkey"
    with awake(finished / "stack", ("audit", "registry")) as stack:
        asyncio.run(witness_all(stack))
        shown = inside("audit", "status", "--dir", finished)
        assert "by 4 of 4 hospitals (3 needed)" in shown
        assert re.search(r"alarms +none", shown)
        inside("audit", "export", "--witnessed", "--out", tmp_path / "log", "--dir", finished)
        asyncio.run(cry_wolf(stack))
        alarmed = CliRunner().invoke(app, ["audit", "status", "--dir", str(finished)])
        assert alarmed.exit_code == 3
        assert re.search(r"yes +hospital-01 +fork", alarmed.output)
        job = json.loads((finished / "r.json").read_text())["job_id"]
        lineage = inside("models", "lineage", f"{job}/3", "--dir", finished)
        assert all(f"checked {name} " in lineage for name in CHECKS)
        asked = ("--hospital", "hospital-02", "--out", tmp_path / "receipt.json", "--dir", finished)
        assert "was counted exactly once in version 2" in inside("audit", "receipt", job, 2, *asked)
    checked = inside("audit", "verify", tmp_path / "log", "--key", key, "--roster", roster)
    assert "4 of 4 hospitals cosigned it, 3 are needed" in checked
    checked = inside("audit", "verify", tmp_path / "receipt.json", "--key", key, "--roster", roster)
    assert "hospital-02's ciphertext" in checked
    assert "nothing was refused" in inside("audit", "evidence", "--dir", finished)
    assert "all follow from the bodies" in inside("audit", "fsck", "--dir", finished)


def test_one_trace_joins_a_round_across_the_processes(finished: Path) -> None:
    """Every span of a round but its root has a parent that was written too, by some process."""
    spans = [
        json.loads(line) | {"process": path.stem}
        for path in (finished / "stack" / "traces").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    (trace,) = {span["context"]["trace_id"] for span in spans if span["attributes"].get("fedmesh.round") == 2}
    joined = [span for span in spans if span["context"]["trace_id"] == trace]
    written = {span["context"]["span_id"] for span in joined}
    (root,) = [span for span in joined if span["parent_id"] is None]
    assert root["name"] == "round committed"
    assert {span["parent_id"] for span in joined if span is not root} <= written
    processes = {span["process"] for span in joined}
    assert processes >= {"registry", "coordinator", "aggregator", "audit", "hospital-00", "hospital-03"}
    assert {key for span in spans for key in span["attributes"]} <= ALLOWED
    assert not any("events" in span or "description" in span["status"] for span in spans)


def test_no_patient_identifier_is_in_the_centre(finished: Path) -> None:
    """Encounter and patient numbers of the cohort stand in no log and no audit entry."""
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"select encounter_id, patient_nbr from '{finished}/data/synthetic/diabetic_data.parquet' limit 2000"
        ).fetchall()
    identifiers = {number for row in rows for number in row}
    for path in (finished / "stack" / "run").glob("*.log"):
        words = set(re.findall(r"\d{7,}", path.read_text(errors="replace")))
        assert not words & identifiers, path.name


class Running:
    """A demonstration in the background."""

    last: ClassVar["Running | None"] = None

    def __init__(self, folder: Path, *arguments: object, through: Sequence[str] = ()) -> None:
        self.folder = folder
        self.stack = Stack(folder / "stack")
        self.report = folder / "r.json"
        self._out = (folder / "out.txt").open("w")
        self.process = subprocess.Popen(
            [*through, *FEDMESH, "demo", "--dir", str(folder), "--report", str(self.report), *map(str, arguments)],
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        Running.last = self

    def output(self) -> str:
        return (self.folder / "out.txt").read_text()

    def wait_for(self, text: str, timeout_s: float = 400.0) -> None:
        """Patience for a machine that has much else to do; it costs nothing where the text comes soon."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"no {text!r} in {timeout_s:g} s: {self.output()}"
            time.sleep(0.2)

    def finish(self, timeout_s: float = 600.0) -> int:
        code = self.process.wait(timeout_s)
        self._out.close()
        return code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "demo"
    made.mkdir()
    yield made
    # A test that gave up leaves its demonstration running: first that, or it would report parts that vanished.
    if Running.last is not None and Running.last.process.poll() is None:
        Running.last.process.terminate()
        Running.last.finish(60)
    Stack(made / "stack").stop()


@pytest.mark.slow
def test_stores_and_a_hospital_fail_in_mid_run_and_the_run_recovers(folder: Path) -> None:
    run = Running(folder, "--hospitals", 5, "--rounds", 8)
    run.wait_for("round 1/8 committed")
    run.stack.supervisor.kill("hospital-04")
    run.wait_for("round 2/8 committed")
    run.stack.postgres.stop()
    time.sleep(10)
    run.stack.postgres.start()
    run.wait_for("round 4/8 committed")
    run.stack.redis.stop()
    time.sleep(10)
    run.stack.redis.start()
    assert run.finish() == 0, run.output()
    report = json.loads(run.report.read_text())
    assert report["rounds"] == 8
    assert left_running(folder) == []


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("of 4 hospitals connected", marks=pytest.mark.slow),
        "round 1/",
    ],
)
def test_ctrl_c_at_any_moment_stops_everything(folder: Path, after: str) -> None:
    run = Running(folder, "--hospitals", 4, "--rounds", 6)
    if after:
        run.wait_for(after)
    else:
        time.sleep(2.5)
    run.process.send_signal(signal.SIGINT)
    assert run.finish(60) == 130, run.output()
    assert left_running(folder) == []
    assert "Traceback" not in run.output()


def test_an_interrupt_is_heeded_though_a_shell_had_it_ignored(folder: Path) -> None:
    """As in a script's background job, and for the whole process group, as a terminal sends it."""
    run = Running(folder, "--hospitals", 4, "--rounds", 6, through=["sh", "-c", 'trap "" INT; exec "$@"', "sh"])
    run.wait_for("hospitals. Plan:")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish(60) == 130, run.output()
    assert left_running(folder) == []


def test_kill_9_leaves_nothing_behind(folder: Path) -> None:
    run = Running(folder, "--hospitals", 4, "--rounds", 6)
    run.wait_for("hospitals connected")
    run.process.kill()
    run.finish(30)
    deadline = time.monotonic() + 30
    while left_running(folder) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert left_running(folder) == []
