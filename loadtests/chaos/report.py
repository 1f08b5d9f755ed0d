"""The report of a run: JSON for machines, one HTML page with the timeline for people."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtests.chaos.figures import Figures, Window
from loadtests.chaos.records import Call
from loadtests.chaos.settings import Targets
from loadtests.peers.percentiles import percentile

_WIDTH: Final = 1200
_LEFT: Final = 60
_TOP: Final = 20
_HEIGHT: Final = 220
_FAILED_HEIGHT: Final = 60
_LEAST_MS: Final = 1.0
_MOST_MS: Final = 100_000.0
_COLOURS: Final = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b")
_STYLE: Final = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left } .bad { color: #b00020; font-weight: 600 }
.good { color: #1b7f3b; font-weight: 600 } svg { width: 100%; height: auto } text { font: 11px system-ui, sans-serif }
"""


@dataclass(frozen=True)
class Second:
    """What happened to the calls that were due in one bin of time."""

    at: float
    calls: int
    failed: int
    p50_ms: float
    p99_ms: float


def write_report(
    path: Path, figures: Figures, calls: Sequence[Call], windows: Sequence[Window], targets: Targets
) -> tuple[Path, Path]:
    """Write JSON and HTML side by side; returns both paths. Raises: OSError."""
    page = path.with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures.document(), indent=2) + "\n", encoding="utf-8")
    page.write_text(render(figures, calls, windows, targets), encoding="utf-8")
    return path, page


def render(figures: Figures, calls: Sequence[Call], windows: Sequence[Window], targets: Targets) -> str:
    """The HTML page."""
    budget = targets.failed_ratio * figures.calls
    verdict = (
        '<p class="good">Every target was met.</p>'
        if not figures.missed
        else '<p class="bad">Missed:</p><ul>' + "".join(f"<li>{html.escape(x)}</li>" for x in figures.missed) + "</ul>"
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>fedmesh: chaos</title><style>{_STYLE}</style>"
        f"<h1>Replicas and failover under faults</h1>{verdict}"
        f"<p>{html.escape(', '.join(f'{key}: {value}' for key, value in figures.machine.items()))}</p>"
        f"{_summary(figures)}"
        f"<h2>Error budget</h2><p>{figures.failed} of {budget:.1f} failed calls that {targets.failed_ratio:.2%} of "
        f"{figures.calls:,} calls allow: {(figures.failed / budget if budget else 0):.0%} spent.</p>"
        f"<h2>Timeline</h2><p>Latency from the intended time of sending, retries included, by the second: median "
        f"(blue), 99th percentile (orange); below, calls that failed for good. Shaded: faults.</p>"
        f"{timeline(calls, windows)}{_fault_table(figures)}{_checks(figures)}</html>\n"
    )


def _summary(figures: Figures) -> str:
    rows = [
        ("calls", f"{figures.calls:,} in {figures.duration_s:.0f} s"),
        ("failed after retries", f"{figures.failed} ({figures.failed_ratio:.4%})"),
        ("p50, p99 outside outages of a store", f"{figures.p50_ms:.1f} ms, {figures.p99_ms:.1f} ms"),
        ("p99 of all calls", f"{figures.p99_all_ms:.1f} ms"),
        ("p99 in quiet", _number(figures.p99_quiet_ms, "ms")),
        ("lost, doubled, not exact", f"{figures.lost}, {figures.doubled}, {figures.inexact}"),
        ("PostgreSQL without a writer: process killed", _number(figures.postgres_kill_outage_s, "s")),
        ("PostgreSQL without a writer: any fault", _number(figures.postgres_outage_s, "s")),
        ("Redis without a writer", _number(figures.redis_outage_s, "s")),
        ("next round after a store came back", _number(figures.rounds_resumed_s, "s")),
        ("rounds committed", str(figures.rounds)),
        ("part of the run with a fault", f"{figures.fault_share:.0%}"),
    ]
    return "<table>" + "".join(f"<tr><td>{a}<td>{b}</tr>" for a, b in rows) + "</table>"


def _fault_table(figures: Figures) -> str:
    head = "".join(
        f"<th>{name}"
        for name in ("fault", "times", "calls", "failed", "p99", "recovered", "no writer", "next round", "target")
    )
    rows = []
    for fault in figures.faults:
        if fault.skipped:
            rows.append(f"<tr><td>{fault.name}<td colspan=8>skipped: {html.escape(fault.skipped)}</tr>")
            continue
        cells = [
            *(fault.name, str(fault.count), f"{fault.calls:,}"),
            f'<span class="bad">{fault.failed}</span>' if fault.failed else "0",
            *(_number(fault.p99, "ms"), _number(fault.recovered_s, "s"), _number(fault.outage_s, "s")),
            *(_number(fault.rounds_s, "s"), html.escape(fault.target)),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    return f"<h2>Faults</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _checks(figures: Figures) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{count:,}</tr>" for name, count in figures.checked.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in figures.notes)
    return f"<h2>Compared afterwards</h2><table>{rows}</table><ul>{notes}</ul>"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}"


# ---- the picture


def seconds(calls: Sequence[Call], bins: int) -> list[Second]:
    """Calls by the time they were due, in at most `bins` bins of whole seconds each."""
    if not calls:
        return []
    began, ended = min(call.at for call in calls), max(call.at for call in calls)
    width = max(1, math.ceil((ended - began + 1) / bins))
    found: dict[int, list[Call]] = {}
    for call in calls:
        found.setdefault(int((call.at - began) // width), []).append(call)
    return [_second(began + number * width, found[number]) for number in sorted(found)]


def _second(at: float, calls: Sequence[Call]) -> Second:
    latencies = [call.latency_ms for call in calls]
    failed = sum(call.failed for call in calls)
    return Second(at, len(calls), failed, percentile(latencies, 0.5), percentile(latencies, 0.99))


def timeline(calls: Sequence[Call], windows: Sequence[Window]) -> str:
    """An SVG: latency on a logarithmic scale, failed calls, and the faults behind both."""
    bins = seconds(calls, 1100)
    if not bins:
        return ""
    began, span = bins[0].at, max(1.0, bins[-1].at - bins[0].at + 1)
    total = _TOP + _HEIGHT + 20 + _FAILED_HEIGHT

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * min(1.0, max(0.0, (at - began) / span))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {total + 40}" role="img" aria-label="latency and failures over time">']
    parts += _shades(windows, x, total)
    parts += _grid()
    for colour, values in (("#f58518", [b.p99_ms for b in bins]), ("#4c78a8", [b.p50_ms for b in bins])):
        points = " ".join(f"{x(b.at):.1f},{_y(v):.1f}" for b, v in zip(bins, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
    most = max(1, *(b.failed for b in bins))
    for b in bins:
        if b.failed:
            height = _FAILED_HEIGHT * b.failed / most
            parts.append(
                f'<rect x="{x(b.at):.1f}" y="{total - height:.1f}" width="2" height="{height:.1f}" fill="#b00020"/>'
            )
    parts.append(
        f'<text x="4" y="{total - _FAILED_HEIGHT + 10}">failed</text><text x="4" y="{total}">max {most}</text>'
    )
    for minute in range(0, int(span // 60) + 1, max(1, int(span // 1200))):
        parts.append(f'<text x="{x(began + 60 * minute):.1f}" y="{total + 16}">{minute} min</text>')
    return "".join([*parts, "</svg>"])


def _shades(windows: Sequence[Window], x: Any, total: int) -> list[str]:
    groups = list(dict.fromkeys(window.group for window in windows))
    colours = {group: _COLOURS[number % len(_COLOURS)] for number, group in enumerate(groups)}
    parts = []
    for window in windows:
        left, right = x(window.start), x(window.whole)
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{max(1.0, right - left):.1f}" height="{total - _TOP}" '
            f'fill="{colours[window.group]}" opacity="0.18"><title>{html.escape(window.name)}: '
            f"{html.escape(window.target)}, {window.whole - window.start:.1f} s</title></rect>"
        )
    for number, (group, colour) in enumerate(colours.items()):
        at = _LEFT + 110 * number
        parts.append(f'<rect x="{at}" y="{total + 24}" width="12" height="12" fill="{colour}" opacity="0.5"/>')
        parts.append(f'<text x="{at + 16}" y="{total + 34}">{html.escape(group)}</text>')
    return parts


def _y(milliseconds: float) -> float:
    """Where a latency is drawn: logarithmic."""
    share = math.log10(max(_LEAST_MS, milliseconds) / _LEAST_MS) / math.log10(_MOST_MS / _LEAST_MS)
    return _TOP + _HEIGHT * (1 - min(1.0, share))


def _grid() -> list[str]:
    parts = []
    for label, value in (
        ("1 ms", 1.0),
        ("10 ms", 10.0),
        ("100 ms", 100.0),
        ("1 s", 1e3),
        ("10 s", 1e4),
        ("100 s", 1e5),
    ):
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{_y(value):.1f}" y2="{_y(value):.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="4" y="{_y(value) + 4:.1f}">{label}</text>')
    return parts
