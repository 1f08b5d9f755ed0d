"""The curve for people at a terminal: a drawing, the figures, the recommendation."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import plotille
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.tradeoff.curve import Band, Point
from services.tradeoff.recommendation import least_kept
from services.tradeoff.report import TradeoffReport

_WIDTH: Final = 54
_HEIGHT: Final = 12
# Room beyond the outermost points, so that they are seen.
_MARGIN: Final = 0.06


def show(console: Console, report: TradeoffReport) -> None:
    """Print everything that a person needs to choose."""
    curve = report.curve
    colours = console.is_terminal and not console.no_color
    for name, band, reference, alone in (
        ("AUROC", _auroc, curve.reference.auroc, curve.alone.auroc),
        ("AUPRC", _auprc, curve.reference.auprc, curve.alone.auprc),
    ):
        drawn = drawing(name, curve.points, band, reference, alone, colours=colours)
        console.print(Text.from_ansi(drawn), no_wrap=True, crop=False)
    console.print(_table(report))
    console.print(_what(report), highlight=False)
    _recommend(console, report)


def drawing(
    name: str,
    points: Sequence[Point],
    band: Callable[[Point], Band],
    reference: float,
    alone: float,
    *,
    colours: bool,
) -> str:
    """A figure against log epsilon: the means, vertical bars for their band, two horizontal references."""
    x = [math.log10(point.epsilon) for point in points]
    bands = [band(point) for point in points]
    left, right = _limits(x)
    low, high = _limits([reference, alone, *(end for item in bands for end in (item.floor, item.high or item.mean))])
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = _WIDTH, _HEIGHT, colours
    figure.color_mode, figure.origin = "names", False
    figure.set_x_limits(left, right)
    figure.set_y_limits(low, high)
    figure.x_label, figure.y_label = "epsilon", name
    figure.x_ticks_fkt = lambda at, _next: f"{10**at:.2g}"
    figure.y_ticks_fkt = lambda at, _next: f"{at:8.4f}"
    figure.plot([left, right], [reference, reference], lc=_colour("green", colours))
    figure.plot([left, right], [alone, alone], lc=_colour("red", colours))
    for at, item in zip(x, bands, strict=True):
        if item.low is not None and item.high is not None:
            figure.plot([at, at], [item.low, item.high], lc=_colour("cyan", colours))
    means = [item.mean for item in bands]
    figure.plot(x, means, lc=_colour("blue", colours))
    figure.scatter(x, means, lc=_colour("blue", colours), marker="o")
    for height, text in ((reference, "no privacy"), (alone, "hospital alone")):
        figure.text([left], [height], [text], lc=_colour("white", colours))
    drawn: str = figure.show()
    return drawn + "\n"


def _colour(name: str, colours: bool) -> str | None:
    return name if colours else None


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = _MARGIN * (high - low) or 0.01
    return low - room, high + room


def _auroc(point: Point) -> Band:
    return point.auroc


def _auprc(point: Point) -> Band:
    return point.auprc


def _table(report: TradeoffReport) -> Table:
    curve, subject = report.curve, report.subject
    table = Table(
        title=f"{subject.encounters:,} held-out encounters of {subject.patients:,} patients "
        f"({100 * curve.prevalence:.1f} % positive)"
    )
    for header in ("epsilon", "AUROC", "+- 95 %", "AUPRC", "+- 95 %", "gain kept", "alone"):
        table.add_column(header, justify="right")
    for point in curve.points:
        chosen = point.epsilon == report.recommendation.epsilon
        table.add_row(
            f"{point.epsilon:g}",
            *_cells(point.auroc),
            *_cells(point.auprc),
            f"{least_kept(point, curve):.0%}",
            f"{point.alone.auroc:.3f}/{point.alone.auprc:.3f}",
            style="bold" if chosen else None,
        )
    table.add_section()
    for label, scores in (("no privacy", curve.reference), ("alone, mean", curve.alone)):
        table.add_row(label, f"{scores.auroc:.4f}", "", f"{scores.auprc:.4f}", "", "", "")
    return table


def _cells(band: Band) -> tuple[str, str]:
    return f"{band.mean:.4f}", "" if band.high is None else f"{band.high - band.mean:.4f}"


def _what(report: TradeoffReport) -> str:
    subject, runs = report.subject, report.curve.runs
    kind = "a SYNTHETIC cohort: nobody in it exists" if subject.synthetic else "public records"
    bands = (
        f"Bands: the 95 % confidence interval of the mean over {runs} runs that differ by their noise alone, not by "
        "their patients."
        if runs > 1
        else "One run at each epsilon: no band. Give --seeds 3 or more to see what is luck of the noise."
    )
    return (
        f"[dim]Plan {subject.plan}, {subject.rounds} rounds, all {subject.hospitals} hospitals in each, guarantee "
        f"(epsilon, delta {subject.delta:g}, f {subject.colluders}); {subject.dataset}, {kind}. The node's own "
        f"training, clipping and noise, without services and encryption. {bands} gain kept: of what the plan gains "
        "over chance without privacy, by the lower bounds, the smaller of both figures. alone, in a row of an epsilon: "
        "AUROC/AUPRC of each hospital that trains this plan by itself under the same guarantee, mean; in the last row: "
        "its own logistic regression without privacy, strength chosen on its own part of these rows.[/dim]"
    )


def _recommend(console: Console, report: TradeoffReport) -> None:
    chosen, subject = report.recommendation, report.subject
    console.print(
        f"\n[bold]Recommended: epsilon {chosen.epsilon:g}[/bold] (the plan states {subject.stated_epsilon:g})",
        highlight=False,
    )
    for reason in chosen.reasons:
        console.print(_bullet(reason))
    if subject.synthetic:
        console.print(_bullet("The cohort is synthetic: the shape of the curve may carry over, its figures do not."))
    console.print(
        "[dim]Nothing was charged, because nobody's privacy was at stake. On a hospital's own patients each of these "
        "runs would be a release: it takes a job, which is noised and charged to their ledger.[/dim]",
        highlight=False,
    )


def _bullet(text: str) -> Any:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("-", text)
    return grid
