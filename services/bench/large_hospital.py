"""`fedmesh bench hospital`: a large hospital from its Parquet file to its first masked, encrypted contribution.

A synthetic file is made in a temporary folder and removed afterwards; `one_hospital` does a hospital's work in a
process of its own, whose memory is sampled with that of its children. Beside it stands what DuckDB alone needs to scan
the same columns of the same file, on one core as the node reads.
"""

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import psutil
from rich.console import Console
from rich.table import Table

from services.bench.schema_data import write_hospital
from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import local_columns
from services.hospital_node.sources.table import interruptible
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes

# Ten million patients at fifteen hospitals.
PATIENTS: Final = 667_000
MEMORY_LIMIT_MB: Final = 2048.0
PHASES: Final = ("read", "features", "train_clip_sum", "noise", "encrypt")
_PLAN: Final = "readmission-logistic-private"
_SAMPLE_S: Final = 0.05
_END_S: Final = 10.0


@dataclass(frozen=True)
class LargeOptions:
    """folder: keeps compiled plans for the next time, and holds the temporary files while the benchmark runs."""

    folder: Path
    patients: int = PATIENTS
    report: Path | None = None


@dataclass(frozen=True)
class LargeReport:
    """phase_s: wall-clock seconds of the hospital. read: Parquet to the texts of the cohort; features: texts to the
    numbers in TensorFlow's memory, split and capped; train_clip_sum: the plan's graph; noise: the hospital's share;
    encrypt: ciphertext, secrets, shares, masks, all on the disk. patients_per_s: of all phases together.

    start_s: compiling with TFF, once for a plan, and loading TensorFlow's library; not in the phases.
    duckdb_scan_patients_per_s: DuckDB alone over the columns that the plan needs; ratio: how many times as fast it is.
    peak_rss_mb: most resident memory of the hospital's process and all its children together, MiB.
    """

    plan: str
    features: int
    patients: int
    encounters: int
    parquet_mb: float
    phase_s: dict[str, float]
    patients_per_s: float
    duckdb_scan_patients_per_s: float
    ratio: float
    peak_rss_mb: float
    memory_limit_mb: float
    start_s: float
    upload_bytes: int
    within_memory: bool


def run_large_hospital(options: LargeOptions, console: Console) -> LargeReport:
    """Make the file, measure, remove the file. Whatever happens, nothing is left running.

    Raises: FedmeshError: INVALID_ARGUMENT for a number of patients; STORE_FULL; as the hospital's own steps.
    """
    if options.patients < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--patients {options.patients}: at least one is needed")
    plan = shipped_plan(_PLAN)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hospital-", dir=options.folder) as name:
        scratch = Path(name)
        data = scratch / "hospital.parquet"
        with console.status(f"Making a SYNTHETIC hospital of {options.patients:,} patients (DuckDB) ..."):
            write_hospital(data, plan, options.patients)
        with console.status("Scanning its columns with DuckDB alone ..."):
            scan_s = scan_seconds(data, plan)
        with console.status("Reading, training, clipping, adding noise and encrypting as a hospital does ..."):
            found, peak_mb = _measured(scratch, data, plan, options.folder / "compiled")
        report = _report(plan, options.patients, data, scan_s, found, peak_mb)
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _show(console, report)
    return report


def scan_seconds(data: Path, plan: PlanManifest) -> float:
    """How long DuckDB takes on one core to read and hash every cell of the plan's columns: the hash keeps it from
    answering by the file's statistics."""
    hashed = ", ".join(f'bit_xor(hash("{name}"))' for name in local_columns(plan, None))
    with interruptible(), duckdb.connect(config={"threads": "1"}) as database:
        database.execute("SET enable_progress_bar = false")
        started = time.perf_counter()
        database.execute(f"SELECT {hashed} FROM read_parquet($path)", {"path": str(data)}).fetchall()  # noqa: S608
        return time.perf_counter() - started


def _measured(scratch: Path, data: Path, plan: PlanManifest, cache: Path) -> tuple[Mapping[str, Any], float]:
    """What the hospital's process found, and the peak of its tree's resident memory in MiB."""
    plan_file, kept = scratch / "plan.json", scratch / "node"
    plan_file.write_bytes(canonical_bytes(plan))
    kept.mkdir(mode=0o700)
    given = {"plan": plan_file, "data": data, "cache": cache.absolute(), "folder": kept}
    command = [sys.executable, "-m", "services.bench.one_hospital", *(f"--{name}={at}" for name, at in given.items())]
    with (scratch / "out").open("w+") as out, (scratch / "err").open("w+") as err:
        # A session of its own: Ctrl-C reaches it only through `_ended`.
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
        with _ended(child), _PeakRss(child.pid) as memory:
            code = child.wait()
        out.seek(0)
        err.seek(0)
        return _answer(out.read(), err.read(), code), memory.peak_mb


@contextmanager
def _ended(child: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> Iterator[None]:
    """Whatever happens in the block, the child is gone afterwards, and what it started is ended by itself before."""
    try:
        yield
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_END_S)
            child.kill()
            child.wait()


def _answer(out: str, err: str, code: int) -> Mapping[str, Any]:
    lines = out.strip().splitlines()
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(lines[-1] if lines else "")
        if code == 0:
            return found
        raise FedmeshError(Code(found["code"]), found["error"])
    reason = err.strip().splitlines()[-1:] or ["no output"]
    raise FedmeshError(Code.INTERNAL, f"the hospital's process ended with status {code}: {reason[0][:300]}")


class _PeakRss:
    """Samples the resident memory of a process and its descendants; `peak_mb` is the largest sum, MiB, and at least the
    process's own peak as the kernel has it."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-rss", daemon=True)

    def __enter__(self) -> "_PeakRss":
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            with contextlib.suppress(psutil.Error):
                family = [self._process, *self._process.children(recursive=True)]
                total = sum(_rss_bytes(process) for process in family) / 2**20
                self.peak_mb = max(self.peak_mb, total, _own_peak_mb(self._process.pid))


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _own_peak_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _report(
    plan: PlanManifest, patients: int, data: Path, scan_s: float, found: Mapping[str, Any], peak_mb: float
) -> LargeReport:
    phases = {name: found["phase_s"][name] for name in PHASES}
    own, scan = patients / math.fsum(phases.values()), patients / scan_s
    return LargeReport(
        plan=plan.name,
        features=found["features"],
        patients=patients,
        encounters=found["encounters"],
        parquet_mb=data.stat().st_size / 2**20,
        phase_s=phases,
        patients_per_s=own,
        duckdb_scan_patients_per_s=scan,
        ratio=scan / own,
        peak_rss_mb=peak_mb,
        memory_limit_mb=MEMORY_LIMIT_MB,
        start_s=found["start_s"],
        upload_bytes=found["upload_bytes"],
        within_memory=peak_mb <= MEMORY_LIMIT_MB,
    )


def _show(console: Console, report: LargeReport) -> None:
    table = Table(
        title=f"SYNTHETIC hospital: {report.patients:,} patients, {report.encounters:,} encounters, "
        f"{report.parquet_mb:.1f} MiB of Parquet"
    )
    for header in ("phase", "seconds", "patients/s"):
        table.add_column(header, justify="left" if header == "phase" else "right")
    for name in PHASES:
        seconds = report.phase_s[name]
        table.add_row(name.replace("_", ", "), f"{seconds:.3f}", f"{report.patients / seconds:,.0f}")
    table.add_section()
    total = math.fsum(report.phase_s.values())
    table.add_row("all", f"{total:.3f}", f"{report.patients_per_s:,.0f}")
    scan = report.duckdb_scan_patients_per_s
    table.add_row("DuckDB's own scan of the columns", f"{report.patients / scan:.3f}", f"{scan:,.0f}")
    console.print(table)
    verdict = "[green]within[/green]" if report.within_memory else "[red]beyond[/red]"
    console.print(
        f"The first contribution to {report.plan} ({report.features} features, {report.upload_bytes:,} bytes masked "
        f"and encrypted) takes {report.ratio:.1f} times as long as DuckDB's scan. Peak resident memory of the process "
        f"and its children: {report.peak_rss_mb:,.0f} MiB, {verdict} {report.memory_limit_mb:,.0f}. Loading "
        f"TensorFlow, and compiling where the plan was new, took {report.start_s:.1f} s besides.",
        highlight=False,
    )
