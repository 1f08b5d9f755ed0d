"""`fedmesh bench registry`: reads from a registry full of generated rows, sent when they are due."""

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
from fedmesh.registry.v1 import performance_pb2, registry_pb2
from rich.console import Console
from rich.table import Table

from services.bench.bounds import quantiles_ms
from services.bench.row_security import ALL, SAME, cost_of_row_security
from services.bench.usage import store_cpu_seconds
from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.embedded.guard import Guard
from services.embedded.stack import Stack

HOSPITAL: Final = "hospital-01"
POINT_MS: Final = 20.0
PAGE_MS: Final = 50.0
PAGE: Final = 50
ROW_SECURITY: Final = 1.3

_ROWS: Final = Path(__file__).with_name("registry_rows.sql")
_SEED: Final = 7
_JOBS: Final = 1000
_WARM: Final = 50
_PATIENCE_S: Final = 30.0
_SERIES_VERSIONS: Final = 20
_POINT: Final = "a model version"


@dataclass(frozen=True)
class RegistryOptions:
    """versions, metrics: generated rows. rate: reads a second, one version and one page in turn, for `seconds`."""

    folder: Path
    versions: int = 100_000
    metrics: int = 1_000_000
    rate: float = 100.0
    seconds: float = 20.0
    report: Path | None = None


@dataclass(frozen=True)
class RegistryReport:
    """What the run measured. Latencies in milliseconds, from the moment a request was due; those of pages by what is
    listed. failed: reads that got no answer, after the client's retries. database_bytes: with indexes. cpu_ms: CPU time
    of registry and PostgreSQL for each read. row_security: CPU time of PostgreSQL as a multiple of that without, by
    what is read and what is left out: see `cost_of_row_security`. load: the machine's load average at the end of the
    reads.
    """

    versions: int
    metrics: int
    database_bytes: int
    fill_s: float
    rate: float
    seconds: float
    cores: int
    load: float
    cpu_ms: float
    failed: int
    point_ms: dict[str, float]
    page_ms: dict[str, dict[str, float]]
    row_security: dict[str, dict[str, float]]

    def targets(self) -> dict[str, tuple[float, str, bool]]:
        """By what is asked: the figure, the limit and whether it is kept."""
        point = self.point_ms["p99"]
        pages = {f"{name}, p99, ms": (told["p99"], PAGE_MS) for name, told in self.page_ms.items()}
        secured = {
            f"{name}, PostgreSQL's CPU for each without {SAME}": (told[SAME], ROW_SECURITY)
            for name, told in self.row_security.items()
        }
        return {
            name: (figure, f"< {limit:g}", figure < limit)
            for name, (figure, limit) in {f"{_POINT}, p99, ms": (point, POINT_MS), **pages, **secured}.items()
        } | {"reads without an answer": (self.failed, "0", not self.failed)}


def run_registry(options: RegistryOptions, console: Console) -> RegistryReport:
    """Run the benchmark. Whatever happens, nothing is left running, and the rows are gone.

    Raises: FedmeshError: a part that did not start, a full disk, or a refused read.
    """
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    stack = Stack(options.folder / "stack", guard=guard, traces=False)
    try:
        with console.status("Starting PostgreSQL, the registry and the audit service ..."):
            stack.start(("registry", "audit"))
        with console.status(f"Generating {options.versions:,} versions and {options.metrics:,} measurements ..."):
            fill_s = _fill(stack, options)
        with console.status("Measuring ..."):
            report = asyncio.run(_measure(stack, options, fill_s))
    finally:
        with console.status("Stopping everything ..."):
            stack.destroy()
            guard.close()
    if options.report is not None:
        told = asdict(report) | {"kept": {name: kept for name, (_, _, kept) in report.targets().items()}}
        options.report.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _print(console, report)
    return report


def _fill(stack: Stack, options: RegistryOptions) -> float:
    """Make the rows. Returns seconds. Raises: FedmeshError(STORE_FULL)."""
    started = time.monotonic()
    rows = {"versions": options.versions, "metrics": options.metrics}
    try:
        with psycopg.connect(stack.postgres.dsn(), cursor_factory=psycopg.ClientCursor) as connection:
            connection.execute(_ROWS.read_text(encoding="utf-8").encode(), rows)
        with psycopg.connect(stack.postgres.dsn(), autocommit=True) as connection:
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")
    except psycopg.errors.DiskFull as error:
        raise FedmeshError(Code.STORE_FULL, f"no room for so many rows in {options.folder}: name fewer") from error
    return time.monotonic() - started


Read = Callable[[], Awaitable[Any]]


async def _measure(stack: Stack, options: RegistryOptions, fill_s: float) -> RegistryReport:
    jobs, size = await _jobs(stack)
    tls = stack.hospital_tls(HOSPITAL)
    async with (
        stub(stack, "registry", tls) as hospital,
        stub(stack, "performance", tls) as performance,
        stub(stack, "registry") as operator,
    ):
        reads = _reads(hospital, performance, operator, jobs)
        for _ in range(_WARM):
            for read in reads.values():
                await read()
        before = store_cpu_seconds(stack, "registry")
        latencies, failed = await open_loop(list(reads.values()), options.rate, options.seconds)
        cpu_ms = 1000 * (store_cpu_seconds(stack, "registry") - before) / sum(map(len, latencies))
    told = {name: quantiles_ms(found) for name, found in zip(reads, latencies, strict=True)}
    return RegistryReport(
        versions=options.versions,
        metrics=options.metrics,
        database_bytes=size,
        fill_s=fill_s,
        rate=options.rate,
        seconds=options.seconds,
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        cpu_ms=cpu_ms,
        failed=failed,
        point_ms=told.pop(_POINT),
        page_ms=told,
        row_security=await cost_of_row_security(stack.postgres, HOSPITAL, jobs, PAGE),
    )


async def _jobs(stack: Stack) -> tuple[list[UUID], int]:
    """Some jobs of the hospital that asks, and the bytes of the database."""
    async with await psycopg.AsyncConnection.connect(stack.postgres.dsn()) as connection:
        rows = await connection.execute(
            "select job_id from registry.job_hospitals where hospital_id = %s order by random() limit %s",
            (HOSPITAL, _JOBS),
        )
        jobs = [row[0] async for row in rows]
        size = await (await connection.execute("select pg_database_size(current_database())")).fetchone()
        assert size is not None
        return jobs, size[0]


def _reads(hospital: Any, performance: Any, operator: Any, jobs: list[UUID]) -> dict[str, Read]:
    """What is read, each time of a job by chance, and as often one version as any page. Row-level security holds an
    operator to its scope as it holds a hospital to its own.
    """
    chance = random.Random(_SEED)  # noqa: S311 - a sample

    def job() -> str:
        return str(chance.choice(jobs))

    async def point() -> None:
        request = registry_pb2.GetModelVersionRequest(job_id=job())
        await call(hospital.GetModelVersion, request, timeout_s=_PATIENCE_S)

    async def of_job() -> None:
        request = registry_pb2.ListModelVersionsRequest(job_id=job(), page_size=PAGE)
        await call(operator.ListModelVersions, request, timeout_s=_PATIENCE_S)

    async def newest() -> None:
        await call(
            operator.ListModelVersions, registry_pb2.ListModelVersionsRequest(page_size=PAGE), timeout_s=_PATIENCE_S
        )

    async def numbers() -> None:
        request = performance_pb2.ListPerformanceRequest(job_id=job(), page_size=_SERIES_VERSIONS)
        await call(performance.ListPerformance, request, timeout_s=_PATIENCE_S)

    return {
        _POINT: point,
        f"{PAGE} versions of a job": of_job,
        f"the newest {PAGE} versions": newest,
        f"all numbers of {_SERIES_VERSIONS} versions": numbers,
    }


async def open_loop(reads: list[Read], rate: float, seconds: float) -> tuple[tuple[list[float], ...], int]:
    """Send reads when they are due, whether or not those before are answered: the first kind every other time, between
    them the others in turn. Returns seconds by kind, at least one each, and how many failed; those took time too.

    Raises: FedmeshError for a refusal that is no sign of overload.
    """
    failed = 0
    latencies: tuple[list[float], ...] = tuple([] for _ in reads)
    others = itertools.cycle(range(1, len(reads)))

    async def send(kind: int, due: float) -> None:
        nonlocal failed
        try:
            await reads[kind]()
        except FedmeshError as error:
            if not error.retryable:
                raise
            failed += 1
        latencies[kind].append(time.monotonic() - due)

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(max(2 * len(reads), round(rate * seconds))):
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(send(next(others) if number % 2 else 0, due))
    return latencies, failed


def _print(console: Console, report: RegistryReport) -> None:
    table = Table(title=f"{report.rate:g} reads a second for {report.seconds:g} s, {report.cores} cores")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("target", justify="right")
    table.add_row("model versions", f"{report.versions:,}", "")
    table.add_row("measurements", f"{report.metrics:,}", "")
    table.add_row("database, GB", f"{report.database_bytes / 1e9:.2f}", "")
    table.add_row("load average", f"{report.load:.1f}", "")
    table.add_row("CPU of registry and PostgreSQL, ms a read", f"{report.cpu_ms:.1f}", "")
    for name, told in {_POINT: report.point_ms, **report.page_ms}.items():
        table.add_row(f"{name}, p50, ms", f"{told['p50']:.1f}", "")
    for name, told in report.row_security.items():
        table.add_row(f"{name}, PostgreSQL's CPU for each without {ALL}", f"{told[ALL]:.2g}", "")
    for name, (value, limit, kept) in report.targets().items():
        table.add_row(name, f"{value:.2g}" if value < 10 else f"{value:.1f}", limit if kept else f"{limit} MISSED")
    console.print(table)
    console.print(
        f"Rows were generated in {report.fill_s:.0f} s. Times are from the moment a read was due. With row-level"
        " security and without, the same prepared statement runs in the same transaction of one round trip: as the"
        " registry's role, and as the superuser, whom no policy concerns."
    )
