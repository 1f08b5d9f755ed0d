"""The figures of a run, from its files: errors, latencies, outages, recoveries, and what missed its target."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from loadtests.chaos.records import Call
from loadtests.chaos.settings import Options, Targets
from loadtests.peers.percentiles import percentile

# A call this slow is not well yet.
SLOW_MS: Final = 500.0
# After a fault has been mended, calls still belong to it for so long.
TAIL_S: Final = 3.0
# A store whose probe, ten times a second, is not served for so long has an outage.
OUTAGE_S: Final = 1.0
# Faults of PostgreSQL that end its process alone, which its watcher sees at once.
PROCESS_KILLS: Final = ("postgres-kill", "postgres-lag-kill")


@dataclass(frozen=True)
class Window:
    """One fault as it happened; times in seconds since the epoch. writer: the store that it stopped, or ""."""

    name: str
    group: str
    target: str
    writer: str
    start: float
    whole: float

    def has(self, at: float) -> bool:
        return self.start <= at <= self.whole + TAIL_S


@dataclass
class FaultFigures:
    """All repetitions of a fault. recovered_s: from the fault until no call failed or was slow, the worst time.

    outage_s: the longest time in which its store took no write. rounds_s: from the store's first write after the last
    such time, or from the fault where it stops no store, to the next committed round; the worst time.
    """

    name: str
    target: str
    count: int
    calls: int = 0
    failed: int = 0
    p99: float | None = None
    recovered_s: float = 0.0
    outage_s: float | None = None
    rounds_s: float | None = None
    skipped: str = ""


@dataclass
class Figures:
    """p99_ms: outside outages of a store's writer; p99_all_ms: with them; p99_quiet_ms: outside all faults.

    postgres_kill_outage_s: of faults that kill the process alone. missed: the targets that were not met, in words.
    """

    calls: int
    failed: int
    failed_ratio: float
    p50_ms: float
    p99_ms: float
    p99_all_ms: float
    p99_quiet_ms: float | None
    lost: int
    doubled: int
    inexact: int
    postgres_outage_s: float | None
    postgres_kill_outage_s: float | None
    redis_outage_s: float | None
    rounds: int
    rounds_resumed_s: float | None
    fault_share: float
    duration_s: float
    faults: list[FaultFigures]
    machine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return asdict(self)


def outage(writes: Sequence[float], window: Window) -> float:
    """The longest time between two writes that touches a fault's window, in seconds."""
    longest = 0.0
    for before, after in itertools.pairwise(writes):
        if after >= window.start and before <= window.whole:
            longest = max(longest, after - before)
    return longest


def outages(writes: Sequence[float], windows: Sequence[Window]) -> list[tuple[float, float]]:
    """The times in which a store took no write, and was meant not to. windows: of faults that stop it.

    A pause that no fault explains is none: calls that were slow in it count.
    """
    gaps = [pair for pair in itertools.pairwise(writes) if pair[1] - pair[0] >= OUTAGE_S]
    return [gap for gap in gaps if any(gap[1] >= window.start and gap[0] <= window.whole for window in windows)]


def first_after(times: Iterable[float], moment: float) -> float | None:
    return next((at for at in times if at >= moment), None)


def recovered(calls: Sequence[Call], window: Window) -> float:
    """Seconds from the fault's start to the last call of its window that failed or was slow; 0 when none was."""
    bad = [call.at for call in calls if window.has(call.at) and (call.failed or call.latency_ms > SLOW_MS)]
    return max(bad) - window.start if bad else 0.0


def measure(
    calls: Sequence[Call],
    windows: Sequence[Window],
    writes: dict[str, list[float]],
    rounds: Sequence[float],
    skipped: dict[str, str],
) -> Figures:
    """Figures without judgement. writes: times of acknowledged probes by store. rounds: times of commits, in order."""
    if not calls:
        raise ValueError("no calls were made")
    quiet = [call.latency_ms for call in calls if not any(window.has(call.at) for window in windows)]
    away = [
        gap
        for store, times in writes.items()
        for gap in outages(times, [window for window in windows if window.writer == store])
    ]
    outside = [call.latency_ms for call in calls if not any(first <= call.at <= last for first, last in away)]
    failed = sum(call.failed for call in calls)
    began, ended = calls[0].at, max(call.at for call in calls)
    faults = [_fault(name, calls, windows, writes, rounds) for name in dict.fromkeys(w.name for w in windows)]
    faults += [FaultFigures(name=name, target="", count=0, skipped=why) for name, why in skipped.items()]
    writer = {window.name: window.writer for window in windows}
    postgres = [fault.outage_s for fault in faults if writer.get(fault.name) == "postgres"]
    redis = [fault.outage_s for fault in faults if writer.get(fault.name) == "redis"]
    resumed = [fault.rounds_s for fault in faults if fault.rounds_s is not None and fault.outage_s is not None]
    return Figures(
        calls=len(calls),
        failed=failed,
        failed_ratio=failed / len(calls),
        p50_ms=percentile([call.latency_ms for call in calls], 0.5),
        p99_ms=percentile(outside, 0.99) if outside else 0.0,
        p99_all_ms=percentile([call.latency_ms for call in calls], 0.99),
        p99_quiet_ms=percentile(quiet, 0.99) if quiet else None,
        lost=0,
        doubled=0,
        inexact=0,
        postgres_outage_s=_longest(postgres),
        postgres_kill_outage_s=_longest([fault.outage_s for fault in faults if fault.name in PROCESS_KILLS]),
        redis_outage_s=_longest(redis),
        rounds=len(rounds),
        rounds_resumed_s=_longest(resumed),
        fault_share=_covered(windows) / (ended - began) if ended > began else 0.0,
        duration_s=ended - began,
        faults=faults,
    )


def _longest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _covered(windows: Sequence[Window]) -> float:
    """Seconds in which at least one fault was there."""
    total, until = 0.0, 0.0
    for window in sorted(windows, key=lambda item: item.start):
        total += max(0.0, window.whole - max(window.start, until))
        until = max(until, window.whole)
    return total


def _fault(
    name: str,
    calls: Sequence[Call],
    windows: Sequence[Window],
    writes: dict[str, list[float]],
    rounds: Sequence[float],
) -> FaultFigures:
    own = [window for window in windows if window.name == name]
    within = [call for call in calls if any(window.has(call.at) for window in own)]
    found = FaultFigures(
        name=name,
        target=", ".join(dict.fromkeys(window.target for window in own)),
        count=len(own),
        calls=len(within),
        failed=sum(call.failed for call in within),
        p99=percentile([call.latency_ms for call in within], 0.99) if within else None,
        recovered_s=max(recovered(calls, window) for window in own),
    )
    stores = [window for window in own if window.writer]
    if stores:
        found.outage_s = max(outage(writes.get(window.writer, []), window) for window in stores)
    found.rounds_s = _longest([_resumed(window, writes, rounds) for window in own])
    return found


def _resumed(window: Window, writes: dict[str, list[float]], rounds: Sequence[float]) -> float | None:
    """Seconds to the first round that was committed after the fault, or after its store took writes again for good: a
    disk that is full lets a write through now and then.
    """
    back = window.start
    if window.writer:
        times = writes.get(window.writer, [])
        gaps = [(b - a, b) for a, b in itertools.pairwise(times) if b >= window.start and a <= window.whole]
        ends = [end for length, end in gaps if length >= OUTAGE_S]
        back = max(ends) if ends else max(gaps, default=(0.0, window.start))[1]
    committed = first_after(rounds, back)
    return None if committed is None else committed - back


def judge(figures: Figures, options: Options, targets: Targets) -> list[str]:
    """The targets that were missed, in words. A run that is not a full one is not held against its size and share."""
    limits: list[tuple[str, float | None, float]] = [
        ("share of failed calls", figures.failed_ratio, targets.failed_ratio),
        ("p99 outside outages of a store, ms", figures.p99_ms, targets.p99_ms),
        ("p99 in quiet, ms", figures.p99_quiet_ms, targets.p99_quiet_ms),
        ("lost", figures.lost, 0),
        ("doubled", figures.doubled, 0),
        ("not exact, or not as stated", figures.inexact, 0),
        (
            "PostgreSQL without a writer after a process kill, s",
            figures.postgres_kill_outage_s,
            targets.postgres_kill_s,
        ),
        ("PostgreSQL without a writer, s", figures.postgres_outage_s, targets.postgres_other_s),
        ("Redis without a writer, s", figures.redis_outage_s, targets.redis_s),
        ("rounds go on after the stores, s", figures.rounds_resumed_s, targets.rounds_resume_s),
    ]
    missed = [
        f"{what}: {value:g}, at most {most:g}" for what, value, most in limits if value is not None and value > most
    ]
    if options.full:
        if figures.calls < targets.calls:
            missed.append(f"calls: {figures.calls}, at least {targets.calls}")
        if figures.fault_share < targets.fault_share:
            missed.append(f"share of faults: {figures.fault_share:.2f}, at least {targets.fault_share:g}")
        missed += [
            f"{fault.name}: skipped, {fault.skipped}"
            if fault.skipped
            else f"{fault.name}: came {fault.count} times, at least {targets.repeats}"
            for fault in figures.faults
            if fault.count < targets.repeats
        ]
    return missed
