"""`fedmesh bench audit`: concurrent appends to a real audit log, beside what the machine's disk can do.

Three times: at the log itself, which is the sequencer and its PostgreSQL; through the service, one event a call; and
through the service with many events a call, as the registry's outbox sends them. Between the first two lies what a call
over mutual TLS costs two Python processes.
"""

import asyncio
import json
import os
import random
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from services.audit.domain.event import make_leaf
from services.audit.sequencer import Sequencer
from services.audit.servicer import read_event
from services.audit.store.postgres import PostgresStore
from services.bench.bounds import fdatasync_rate, plain_insert_rate, quantiles_ms, repeat
from services.bench.usage import store_cpu_seconds
from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.identity import parse_identity
from services.common.ids import new_id
from services.common.postgres import Database
from services.common.tasks import end_tasks
from services.embedded.guard import Guard
from services.embedded.stack import CONSORTIUM, Stack
from services.transparency.checkpoint import load_signing_key
from services.transparency.merkle import Coordinate, Frontier, inclusion_proof, leaf_hash, verify_inclusion

_WARM_S: Final = 2.0
_TREE_SIZE: Final = 100_000
_PROOFS: Final = 2_000
_SEED: Final = 7
_BODY: Final = json.dumps({"round": 1, "attempt": 1, "sha256": "0" * 64})

APPENDS_PER_SYNC: Final = 5.0
APPENDS_PER_INSERT: Final = 1.5
P99_MS: Final = 150.0
PROOFS_PER_S: Final = 20_000.0


@dataclass(frozen=True)
class AuditLogOptions:
    """appenders: each makes one call at a time. events: of each call in the third measurement. seconds: of each of the
    three; the bounds take half of it each.
    """

    folder: Path
    appenders: int = 50
    events: int = 100
    seconds: float = 20.0
    report: Path | None = None


@dataclass(frozen=True)
class AuditLogReport:
    """What the run measured. Rates are per second. log_*: at the sequencer; append*: through the service, one event a
    call; batched_per_s: events through the service, `events` a call. proofs_per_s: inclusion proofs that one core
    verifies, by its CPU time, in a tree of `tree_size` entries. append_cpu_ms: CPU time of audit service and PostgreSQL
    for each append by a call of one event. load: the machine's load average at the end.
    """

    appenders: int
    events: int
    seconds: float
    log_per_s: float
    log_ms: dict[str, float]
    appends_per_s: float
    append_ms: dict[str, float]
    append_cpu_ms: float
    batched_per_s: float
    load: float
    fdatasyncs_per_s: float
    inserts_per_s: float
    tree_size: int
    proofs_per_s: float

    def targets(self) -> dict[str, tuple[float, str, bool]]:
        """By what is asked: the figure, the limit and whether it is kept."""
        per_sync, per_insert = self.log_per_s / self.fdatasyncs_per_s, self.log_per_s / self.inserts_per_s
        return {
            "appends for each fdatasync": (per_sync, f">= {APPENDS_PER_SYNC:g}", per_sync >= APPENDS_PER_SYNC),
            "appends for each plain insert": (
                per_insert,
                f">= {APPENDS_PER_INSERT:g}",
                per_insert >= APPENDS_PER_INSERT,
            ),
            "an append by a call, p99, ms": (self.append_ms["p99"], f"< {P99_MS:g}", self.append_ms["p99"] < P99_MS),
            "proofs verified a second, one core": (
                self.proofs_per_s,
                f">= {PROOFS_PER_S:g}",
                self.proofs_per_s >= PROOFS_PER_S,
            ),
        }


def run_audit_log(options: AuditLogOptions, console: Console) -> AuditLogReport:
    """Run the benchmark. Whatever happens, nothing is left running.

    Raises: FedmeshError: a part that did not start, a refused append, or no append in the whole time.
    """
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    stack = Stack(options.folder / "stack", guard=guard)
    try:
        with console.status("Starting PostgreSQL, the registry and the audit service ..."):
            stack.start(("registry", "audit"))
        with console.status("Measuring ..."):
            report = asyncio.run(_measure(stack, options))
    finally:
        with console.status("Stopping everything ..."):
            stack.destroy()
            guard.close()
    if options.report is not None:
        told = asdict(report) | {"kept": {name: kept for name, (_, _, kept) in report.targets().items()}}
        options.report.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _print(console, report)
    return report


async def _measure(stack: Stack, options: AuditLogOptions) -> AuditLogReport:
    half = options.seconds / 2
    synced = fdatasync_rate(stack.folder, half)
    inserted = await plain_insert_rate(stack.postgres.dsn(), options.appenders, half, _BODY)
    at_log = await _append_to_log(stack, options)
    one, cpu_s = await _append(stack, options, 1)
    many, _ = await _append(stack, options, options.events)
    if not (at_log and one and many):
        raise FedmeshError(Code.INTERNAL, f"no append ended within {options.seconds:g} s: name more --seconds")
    return AuditLogReport(
        appenders=options.appenders,
        events=options.events,
        seconds=options.seconds,
        log_per_s=len(at_log) / options.seconds,
        log_ms=quantiles_ms(at_log),
        appends_per_s=len(one) / options.seconds,
        append_ms=quantiles_ms(one),
        append_cpu_ms=1000 * cpu_s / len(one),
        batched_per_s=options.events * len(many) / options.seconds,
        load=os.getloadavg()[0],
        fdatasyncs_per_s=synced,
        inserts_per_s=inserted,
        tree_size=_TREE_SIZE,
        proofs_per_s=proofs_per_s(_TREE_SIZE, _PROOFS),
    )


async def _append_to_log(stack: Stack, options: AuditLogOptions) -> list[float]:
    """Seconds of appends at a sequencer in this process, beside the service's own: the log lets one write at a time."""
    identity = parse_identity(f"spiffe://{CONSORTIUM}/service/coordinator")
    database = Database(stack.postgres.config("audit_service"))
    await database.open()
    sequencer = Sequencer(PostgresStore(database), load_signing_key(stack.audit_key), SystemClock())
    writing = asyncio.create_task(sequencer.run())

    async def append(worker: int) -> None:
        await sequencer.append([make_leaf(read_event(_event(worker)), identity)])

    try:
        await repeat(append, options.appenders, _WARM_S)
        return await repeat(append, options.appenders, options.seconds)
    finally:
        await end_tasks([writing])
        await database.close()


async def _append(stack: Stack, options: AuditLogOptions, events: int) -> tuple[list[float], float]:
    """Seconds of calls with so many events each, and CPU seconds of audit service and PostgreSQL meanwhile."""
    tls = stack.service_tls("coordinator")
    async with AsyncExitStack() as channels:
        stubs: list[Any] = []
        for _ in range(options.appenders):
            channel = await channels.enter_async_context(MeshChannel(stack.target("audit"), tls))
            stubs.append(channel.stub(audit_pb2_grpc.AuditServiceStub))

        async def append(worker: int) -> None:
            request = audit_pb2.AppendEventsRequest(request_id=new_id(), events=[_event(worker) for _ in range(events)])
            await call(stubs[worker].AppendEvents, request, timeout_s=20)

        await repeat(append, options.appenders, _WARM_S)
        before = store_cpu_seconds(stack, "audit")
        latencies = await repeat(append, options.appenders, options.seconds)
        return latencies, store_cpu_seconds(stack, "audit") - before


def _event(worker: int) -> audit_pb2.Event:
    at = Timestamp()
    at.GetCurrentTime()
    return audit_pb2.Event(
        event_id=new_id(),
        type="contribution.accepted",
        occurred_at=at,
        actor=f"spiffe://bench/hospital/h{worker:03d}",
        subject="job/bench",
        body_json=_BODY,
    )


def proofs_per_s(size: int, proofs: int) -> float:
    """Inclusion proofs verified in a second of CPU time, of random entries in a tree of `size` entries."""
    frontier, hashes = Frontier(), dict[Coordinate, bytes]()
    for number in range(size):
        made = frontier.append(leaf_hash(number.to_bytes(8, "big")))
        hashes |= {Coordinate(node.level, node.position): node.hash for node in made}
    root, chosen = frontier.root(), random.Random(_SEED).choices(range(size), k=proofs)  # noqa: S311 - a sample
    asked = [
        (hashes[Coordinate(0, index)], index, inclusion_proof(index, size, lambda *place: hashes[Coordinate(*place)]))
        for index in chosen
    ]
    started = time.process_time()
    for leaf, index, proof in asked:
        verify_inclusion(leaf, index, size, proof, root)
    return proofs / (time.process_time() - started)


def _print(console: Console, report: AuditLogReport) -> None:
    table = Table(title=f"{report.appenders} appenders, {report.seconds:g} s each")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("target", justify="right")
    table.add_row("appends a second, at the log", f"{report.log_per_s:.0f}", "")
    table.add_row("an append at the log, p50, ms", f"{report.log_ms['p50']:.1f}", "")
    table.add_row("an append at the log, p99, ms", f"{report.log_ms['p99']:.1f}", "")
    table.add_row("appends a second, by calls of one event", f"{report.appends_per_s:.0f}", "")
    table.add_row("an append by a call, p50, ms", f"{report.append_ms['p50']:.1f}", "")
    table.add_row("CPU of audit service and PostgreSQL, ms an append by a call", f"{report.append_cpu_ms:.1f}", "")
    table.add_row(f"events a second, by calls of {report.events}", f"{report.batched_per_s:.0f}", "")
    table.add_row("load average", f"{report.load:.1f}", "")
    table.add_row("fdatasyncs a second, this disk", f"{report.fdatasyncs_per_s:.0f}", "")
    table.add_row(f"plain inserts a second, {report.appenders} connections", f"{report.inserts_per_s:.0f}", "")
    for name, (value, limit, kept) in report.targets().items():
        shown = f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
        table.add_row(name, shown, limit if kept else f"{limit} MISSED")
    console.print(table)
    console.print("At the log: without gRPC. Both ratios are of it: the bounds have no calls in them either.")
    console.print(f"Proofs: random entries of a tree of {report.tree_size} entries, in this process.")
