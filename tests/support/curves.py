"""Curves over epsilon with known figures."""

from services.tradeoff.curve import Curve, Point, Scores, band_of
from services.tradeoff.grid import KEEP
from services.tradeoff.recommendation import Recommendation
from services.tradeoff.report import Subject, TradeoffReport

REFERENCE = Scores(auroc=0.70, auprc=0.30)
ALONE = Scores(auroc=0.62, auprc=0.18)
ALONE_PRIVATE = Scores(auroc=0.55, auprc=0.125)


def curve(figures: dict[float, tuple[float, float]], spread: float = 0.001, runs: int = 3) -> Curve:
    """figures: AUROC and AUPRC by epsilon; runs lie `spread` apart around them."""
    offsets = [spread * (number - (runs - 1) / 2) for number in range(runs)]
    points = tuple(
        Point(
            epsilon,
            1.0 / epsilon,
            band_of([auroc + offset for offset in offsets]),
            band_of([auprc + offset for offset in offsets]),
            ALONE_PRIVATE,
        )
        for epsilon, (auroc, auprc) in sorted(figures.items())
    )
    return Curve(points, REFERENCE, ALONE, prevalence=0.1, runs=runs)


def report(drawn: Curve, chosen: Recommendation, *, synthetic: bool = True) -> TradeoffReport:
    subject = Subject(
        plan="tiny-private",
        plan_id="ab" * 32,
        stated_epsilon=0.5,
        delta=1e-6,
        colluders=4,
        rounds=4,
        dataset="synthetic",
        synthetic=synthetic,
        hospitals=15,
        encounters=1000,
        patients=700,
        positives=100,
    )
    return TradeoffReport(subject, drawn, KEEP, chosen, seconds=1.0)
