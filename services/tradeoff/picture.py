"""The curve as a picture."""

from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from services.common.errors import Code, FedmeshError
from services.privacy.budget import DEFAULT_LIMIT
from services.tradeoff.curve import Band
from services.tradeoff.report import TradeoffReport

WIDTH_PX: Final = 1600
HEIGHT_PX: Final = 800
_DPI: Final = 130
# Of Okabe and Ito (2008): told apart by the colour-blind too.
_CURVE, _REFERENCE, _ALONE, _CHOICE = "#0072B2", "#009E73", "#D55E00", "#CC79A7"


def draw(report: TradeoffReport, path: Path) -> None:
    """Write a PNG of WIDTH_PX x HEIGHT_PX: AUROC and AUPRC against epsilon.

    Raises: FedmeshError(STORE_FULL) when the file cannot be written.
    """
    figure = Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    curve = report.curve
    axes = figure.subplots(1, 2)
    references = ((curve.reference.auroc, curve.alone.auroc), (curve.reference.auprc, curve.alone.auprc))
    for axis, name, (reference, alone) in zip(axes, ("AUROC", "AUPRC"), references, strict=True):
        _panel(axis, report, name, reference, alone)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(_title(report), fontsize=11)
    figure.tight_layout(rect=(0, 0.11, 1, 0.97))
    try:
        figure.savefig(path, format="png", metadata={"Software": "fedmesh"})
    except OSError as error:
        raise FedmeshError(Code.STORE_FULL, f"cannot write {path}: {error.strerror}") from error


def _title(report: TradeoffReport) -> str:
    subject, runs = report.subject, report.curve.runs
    kind = "SYNTHETIC cohort" if subject.synthetic else f"{subject.dataset}, public"
    repeats = f"{runs} runs each, fresh noise" if runs > 1 else "one run each: no band"
    return (
        f"{subject.plan}: {subject.rounds} rounds at {subject.hospitals} hospitals, {kind}\n"
        f"guarantee (epsilon, delta {subject.delta:g}, f {subject.colluders}) for each patient; {repeats}; "
        f"{subject.encounters:,} held-out encounters"
    )


def _panel(axis: Any, report: TradeoffReport, name: str, reference: float, alone: float) -> None:
    points = report.curve.points
    x = [point.epsilon for point in points]
    bands: list[Band] = [point.auroc if name == "AUROC" else point.auprc for point in points]
    lows, highs = [band.low for band in bands if band.low is not None], [b.high for b in bands if b.high is not None]
    if lows:
        axis.fill_between(x, lows, highs, color=_CURVE, alpha=0.2, linewidth=0, label="95 % confidence of the mean")
    axis.plot(x, [band.mean for band in bands], color=_CURVE, marker="o", label="federated, private (mean)")
    dots = [(at, value) for at, band in zip(x, bands, strict=True) for value in band.values]
    axis.scatter(*zip(*dots, strict=True), color=_CURVE, s=10, alpha=0.5, linewidths=0, label="single runs")
    axis.axhline(reference, color=_REFERENCE, linestyle="--", label="federated, no privacy")
    axis.axhline(alone, color=_ALONE, linestyle=":", label="hospital alone, no privacy (mean)")
    chosen = report.recommendation.epsilon
    axis.axvline(chosen, color=_CHOICE, linestyle="-.", label=f"recommended: epsilon {chosen:g}")
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.minorticks_off()
    if max(x) > DEFAULT_LIMIT.epsilon:
        left, right = axis.get_xlim()
        axis.axvspan(max(left, DEFAULT_LIMIT.epsilon), right, color="#888888", alpha=0.08, linewidth=0)
        axis.text(
            right, 0.015, "beyond the default budget ", transform=axis.get_xaxis_transform(), ha="right", fontsize=8,
            color="#555555",
        )  # fmt: skip
        axis.set_xlim(left, right)
    axis.set_xlabel("epsilon (log scale)")
    axis.set_ylabel(f"{name} on held-out encounters")
    axis.grid(alpha=0.25)
