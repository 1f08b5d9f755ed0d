"""`fedmesh bench audit`: concurrent appends to a real audit log, beside what the machine's disk can do.

Through the service, with one event a call and with some, as services send them that have more than one to tell; and at
the log itself, which is the sequencer and its PostgreSQL. Each stands beside plain inserts made the same way.
"""

import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console
from rich.table import Table

from services.bench.audit_loads import measure
from services.bench.bounds import quantiles_ms
from services.embedded.guard import Guard
from services.embedded.stack import Stack
from services.transparency.merkle import Coordinate, Frontier, inclusion_proof, leaf_hash, verify_inclusion

_TREE_SIZE: Final = 100_000
_PROOFS: Final = 2_000
_SEED: Final = 7

APPENDS_PER_SYNC: Final = 5.0
APPENDS_PER_INSERT: Final = 1.5
P99_MS: Final = 150.0
PROOFS_PER_S: Final = 20_000.0


@dataclass(frozen=True)
class AuditLogOptions:
    """appenders: each makes one call at a time. events: of each call where it is not one. seconds: of each measure."""

    folder: Path
    appenders: int = 50
    events: int = 20
    seconds: float = 20.0
    report: Path | None = None


@dataclass(frozen=True)
class AuditLogReport:
    """What the run measured. Rates are per second, of events; *_ms: of calls.

    one_*: appends through the service, one event a call; many_*: `events` a call. plain_*, plain_many_*: single-row
    inserts through a service like it, as many a call. calls_*: calls of that service that do nothing. log_*: appends at
    the sequencer, and inserts_*: single-row inserts, both without calls. *_cpu_ms: CPU time of service and PostgreSQL
    for each event. proofs_per_s: inclusion proofs that one core verifies, by its CPU time, in a tree of `tree_size`
    entries. load: the machine's load average at the end.
    """

    appenders: int
    events: int
    seconds: float
    one_per_s: float
    one_ms: dict[str, float]
    one_cpu_ms: float
    many_per_s: float
    many_ms: dict[str, float]
    many_cpu_ms: float
    plain_per_s: float
    plain_ms: dict[str, float]
    plain_cpu_ms: float
    plain_many_per_s: float
    plain_many_cpu_ms: float
    calls_per_s: float
    calls_cpu_ms: float
    log_per_s: float
    log_ms: dict[str, float]
    inserts_per_s: float
    fdatasyncs_per_s: float
    load: float
    tree_size: int
    proofs_per_s: float

    def targets(self) -> dict[str, tuple[float, str, bool]]:
        """By what is asked: the figure, the limit and whether it is kept."""
        one, many = "calls of one event", f"calls of {self.events} events"
        at_least = {
            f"appends for each fdatasync, {one}": (self.one_per_s / self.fdatasyncs_per_s, APPENDS_PER_SYNC),
            f"appends for each fdatasync, {many}": (self.many_per_s / self.fdatasyncs_per_s, APPENDS_PER_SYNC),
            f"appends for each plain insert, both by {one}": (self.one_per_s / self.plain_per_s, APPENDS_PER_INSERT),
            f"appends for each plain insert, both by {many}": (
                self.many_per_s / self.plain_many_per_s,
                APPENDS_PER_INSERT,
            ),
            "appends for each plain insert, both without calls": (
                self.log_per_s / self.inserts_per_s,
                APPENDS_PER_INSERT,
            ),
        }
        below = {f"{one}, p99, ms": self.one_ms["p99"], f"{many}, p99, ms": self.many_ms["p99"]}
        proofs = "proofs verified a second, one core"
        return {
            **{name: (value, f">= {limit:g}", value >= limit) for name, (value, limit) in at_least.items()},
            **{name: (value, f"< {P99_MS:g}", value < P99_MS) for name, value in below.items()},
            proofs: (self.proofs_per_s, f">= {PROOFS_PER_S:g}", self.proofs_per_s >= PROOFS_PER_S),
        }


def run_audit_log(options: AuditLogOptions, console: Console) -> AuditLogReport:
    """Run the benchmark. Whatever happens, nothing is left running.

    Raises: FedmeshError: a part that did not start, or a refused append.
    """
    Stack(options.folder / "stack").destroy()
    guard = Guard()
    stack = Stack(options.folder / "stack", guard=guard, traces=False)
    try:
        with console.status("Starting PostgreSQL, the registry and the audit service ..."):
            stack.start(("registry", "audit"))
        with console.status("Measuring ..."):
            report = uvloop.run(_measure(stack, options))
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
    loads = await measure(stack, options.appenders, options.events, options.seconds)
    return AuditLogReport(
        appenders=options.appenders,
        events=options.events,
        seconds=options.seconds,
        one_per_s=loads.one.per_s,
        one_ms=quantiles_ms(loads.one.latencies),
        one_cpu_ms=loads.one.cpu_ms,
        many_per_s=options.events * loads.many.per_s,
        many_ms=quantiles_ms(loads.many.latencies),
        many_cpu_ms=loads.many.cpu_ms / options.events,
        plain_per_s=loads.plain.per_s,
        plain_ms=quantiles_ms(loads.plain.latencies),
        plain_cpu_ms=loads.plain.cpu_ms,
        plain_many_per_s=options.events * loads.plain_many.per_s,
        plain_many_cpu_ms=loads.plain_many.cpu_ms / options.events,
        calls_per_s=loads.nothing.per_s,
        calls_cpu_ms=loads.nothing.cpu_ms,
        log_per_s=loads.log.per_s,
        log_ms=quantiles_ms(loads.log.latencies),
        inserts_per_s=loads.inserts.per_s,
        fdatasyncs_per_s=loads.fdatasyncs_per_s,
        load=os.getloadavg()[0],
        tree_size=_TREE_SIZE,
        proofs_per_s=proofs_per_s(_TREE_SIZE, _PROOFS),
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
    table = Table(title=f"{report.appenders} appenders, {report.seconds:g} s each, in turns")
    for name in ("", "a second", "p50, ms", "p99, ms", "CPU, ms"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate, ms, cpu_ms in (
        ("through the service: appends, calls of one event", report.one_per_s, report.one_ms, report.one_cpu_ms),
        (f"appends, calls of {report.events} events", report.many_per_s, report.many_ms, report.many_cpu_ms),
        ("plain inserts, calls of one event", report.plain_per_s, report.plain_ms, report.plain_cpu_ms),
        (f"plain inserts, calls of {report.events} events", report.plain_many_per_s, {}, report.plain_many_cpu_ms),
        ("calls that do nothing", report.calls_per_s, {}, report.calls_cpu_ms),
        ("without calls: appends", report.log_per_s, report.log_ms, None),
        ("plain inserts", report.inserts_per_s, {}, None),
        ("fdatasyncs of this disk", report.fdatasyncs_per_s, {}, None),
    ):
        quantiles = [f"{ms[name]:.1f}" if ms else "" for name in ("p50", "p99")]
        table.add_row(name, f"{rate:.0f}", *quantiles, "" if cpu_ms is None else f"{cpu_ms:.2f}")
    console.print(table)
    judged = Table()
    for name in ("target", "value", "limit"):
        judged.add_column(name, justify="left" if name == "target" else "right")
    for name, (value, limit, kept) in report.targets().items():
        shown = f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
        judged.add_row(name, shown, limit if kept else f"{limit} MISSED")
    console.print(judged)
    console.print("Plain inserts: a row each, committed by itself; through a service like this one, and over as many")
    console.print(
        "connections as appenders. CPU: of service and PostgreSQL, an event; of a call that does nothing, a call."
    )
    console.print(f"Load average {report.load:.1f}. Proofs: of random entries of a tree of {report.tree_size} entries.")
