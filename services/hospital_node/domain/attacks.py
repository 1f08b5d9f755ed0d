"""What attacks on membership found in a hospital's own rows. It is exact, not noised: it stays in the hospital."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

THRESHOLD: Final = "threshold"
LOGISTIC_REGRESSION: Final = "logistic-regression"

ALL: Final = "all"
POSITIVES: Final = "positives"
NEGATIVES: Final = "negatives"


@dataclass(frozen=True)
class Attacked:
    """One attack on rows of one outcome, or on all.

    train_rows, validation_rows: how many rows were members and how many were not. auc: of telling them apart, 0.5 is
    guessing. advantage: the largest |true - false positive rate| of any threshold, 0 is guessing.
    """

    attack: str
    rows: str
    train_rows: int
    validation_rows: int
    auc: float
    advantage: float


@dataclass(frozen=True)
class AttackReport:
    """The attacks on a job's last version. made_at: ISO 8601, UTC."""

    job_id: str
    version: int
    made_at: str
    attacks: tuple[Attacked, ...]

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "AttackReport":
        """Raises: ValueError, KeyError or TypeError when it is no such report."""
        document: dict[str, Any] = json.loads(content)
        attacks: Sequence[dict[str, Any]] = document.pop("attacks")
        return cls(**document, attacks=tuple(Attacked(**one) for one in attacks))
