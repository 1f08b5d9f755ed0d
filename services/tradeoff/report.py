"""What the simulation found, for machines, and what all its views show."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.common.errors import Code, FedmeshError
from services.tradeoff.curve import CONFIDENCE, Curve
from services.tradeoff.recommendation import Recommendation, least_kept


@dataclass(frozen=True)
class Subject:
    """What the curve is of. plan_id: of the plan as it was given, with the epsilon that it states."""

    plan: str
    plan_id: str
    stated_epsilon: float
    delta: float
    colluders: int
    rounds: int
    dataset: str
    synthetic: bool
    hospitals: int
    encounters: int
    patients: int
    positives: int


@dataclass(frozen=True)
class TradeoffReport:
    """seconds: of everything, compiling included. encounters, patients, positives in `subject`: held-out rows."""

    subject: Subject
    curve: Curve
    keep: float
    recommendation: Recommendation
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        curve = self.curve
        held_out = ("encounters", "patients", "positives")
        subject = asdict(self.subject)
        return {
            **{name: value for name, value in subject.items() if name not in held_out},
            "validation": {name: subject[name] for name in held_out},
            "seeds": curve.runs,
            "confidence": CONFIDENCE if curve.runs > 1 else None,
            "points": [{**point.as_dict(), "gain_kept": least_kept(point, curve)} for point in curve.points],
            "no_privacy": asdict(curve.reference),
            "local_only_mean": asdict(curve.alone),
            "keep": self.keep,
            "recommendation": self.recommendation.as_dict(),
            "seconds": round(self.seconds, 2),
        }


def write_report(report: TradeoffReport, path: Path) -> None:
    """Raises: FedmeshError(STORE_FULL) when the file cannot be written."""
    try:
        path.write_text(json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.STORE_FULL, f"cannot write {path}: {error.strerror}") from error
