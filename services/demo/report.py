"""What the demonstration found out, for machines: JSON and CSV. For people: `summary`."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.demo.evaluation import LocalOnly, TestScores
from services.demo.promotion import Promotion
from services.hospital_node.sources.dataset import Rows
from services.privacy.noise import Guarantee


@dataclass(frozen=True)
class PrivacyFacts:
    """The guarantee of the run for each patient, what the charged attempts have spent of it, and how many they are."""

    guarantee: Guarantee
    spent: Guarantee
    attempts: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "epsilon": self.guarantee.epsilon,
            "delta": self.guarantee.delta,
            "unit": "patient",
            "mechanism": "discrete Gaussian shares under a masked homomorphic sum",
            "colluders": self.guarantee.colluders,
            "epsilon_spent": self.spent.epsilon,
            "attempts_charged": self.attempts,
        }


@dataclass(frozen=True)
class Report:
    """Everything that a run found out; durations in seconds, memory in MiB (PSS over all processes)."""

    dataset: str
    hospitals: int
    plan: str
    job_id: str
    rounds: int
    burnt_rounds: int
    model_version: int
    test: TestScores
    local_only: LocalOnly
    privacy: PrivacyFacts | None
    wall_s: float
    startup_s: float
    round_overhead_s: tuple[float, ...]
    peak_memory_mb: float
    upload_bytes: int
    parameters: int
    processes: int
    audit_entries: int
    # Hospitals whose own model differs from the shared one; None where the plan makes none.
    personal_models: int | None = None
    # None where the plan has no checks.
    promotion: Promotion | None = None

    def as_dict(self) -> dict[str, Any]:
        overhead = np.array(self.round_overhead_s or [float("nan")])
        return {
            "dataset": self.dataset,
            "hospitals": self.hospitals,
            "plan": self.plan,
            "job_id": self.job_id,
            "rounds": self.rounds,
            "burnt_rounds": self.burnt_rounds,
            "model_version": self.model_version,
            "test": self.test.as_dict(),
            "local_only": self.local_only.as_dict(),
            "privacy": self.privacy.as_dict() if self.privacy else None,
            "wall_s": round(self.wall_s, 2),
            "startup_s": round(self.startup_s, 2),
            "round_overhead_s": {
                "p50": round(float(np.percentile(overhead, 50)), 4),
                "p99": round(float(np.percentile(overhead, 99)), 4),
            },
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "upload_bytes_per_parameter": round(self.upload_bytes / self.parameters, 2),
            "processes": self.processes,
            "audit_entries": self.audit_entries,
            **({} if self.personal_models is None else {"personal_models": self.personal_models}),
            **({} if self.promotion is None else {"promotion": self.promotion.as_dict()}),
        }


@dataclass(frozen=True)
class Results:
    """The reports of one run or more, in the order of their seeds. With several, figures are means over them."""

    runs: tuple[Report, ...]

    @property
    def last(self) -> Report:
        return self.runs[-1]

    @property
    def test(self) -> dict[str, float]:
        """Mean of every test figure."""
        return mean([run.test.as_dict() for run in self.runs])

    @property
    def test_sd(self) -> dict[str, float] | None:
        """Sample standard deviation (ddof 1) of every test figure; None after one run."""
        if len(self.runs) == 1:
            return None
        # From the mean that is reported: what is the same everywhere then deviates by exactly nothing.
        centre, figures = self.test, [run.test.as_dict() for run in self.runs]
        return {
            name: math.sqrt(sum((figure[name] - centre[name]) ** 2 for figure in figures) / (len(figures) - 1))
            for name in centre
        }

    @property
    def local_only(self) -> dict[str, float]:
        """Mean of every figure of the hospitals alone."""
        return mean([run.local_only.as_dict() for run in self.runs])

    @property
    def wall_s(self) -> float:
        return sum(run.wall_s for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """After several runs: means, the whole duration, the highest memory; everything else is the last run's."""
        if len(self.runs) == 1:
            return self.last.as_dict()
        return {
            **self.last.as_dict(),
            "seeds": len(self.runs),
            "test": self.test,
            "test_sd": self.test_sd,
            "local_only": self.local_only,
            "wall_s": round(self.wall_s, 2),
            "peak_memory_mb": round(max(run.peak_memory_mb for run in self.runs), 1),
        }


def mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every figure; what is the same everywhere stays as it is (counts stay whole numbers)."""
    means = {}
    for name, first in figures[0].items():
        values = [figure[name] for figure in figures]
        means[name] = first if values.count(first) == len(values) else float(np.mean(values))
    return means


def write_report(results: Results, path: Path) -> None:
    """Write the report as JSON. Raises: FedmeshError(STORE_FULL) when the file cannot be written."""
    _write(path, json.dumps(results.as_dict(), indent=2, allow_nan=False) + "\n")


def write_predictions(path: Path, test: Rows, probability: NDArray[np.float64]) -> None:
    """Write `encounter_id,patient_nbr,score` for every test encounter. Raises: as `write_report`."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["encounter_id", "patient_nbr", "score"])
            for encounter, patient, score in zip(test.encounter_ids, test.patient_ids, probability, strict=True):
                writer.writerow([encounter, patient, f"{score:.9g}"])
    except OSError as error:
        raise FedmeshError(Code.STORE_FULL, f"cannot write {path}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.STORE_FULL, f"cannot write {path}: {error.strerror}") from error
