"""The demonstration's report: the same facts for people (a summary) and for machines (JSON, CSV)."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from services.common.errors import Code, FedmeshError
from services.demo.evaluation import LocalOnly, TestScores
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
        }


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON. Raises: FedmeshError(STORE_FULL) when the file cannot be written."""
    _write(path, json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")


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


def print_summary(console: Console, report: Report, folder: Path, description: str) -> None:
    """The summary that a person sees when the run is over."""
    test, alone = report.test, report.local_only
    table = Table(title=f"Common test set: {test.n_encounters:,} encounters of {test.n_patients:,} patients")
    for column in ("model", "AUROC", "AUPRC", "Brier", "recall@10%"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row(
        f"federated, {report.hospitals} hospitals",
        f"{test.auroc:.4f}",
        f"{test.auprc:.4f}",
        f"{test.brier:.4f}",
        f"{test.recall_at_10pct:.3f}",
    )
    table.add_row("each hospital alone, mean", f"{alone.auroc_mean:.4f}", f"{alone.auprc_mean:.4f}", "", "")
    table.add_row("each alone, weighted by rows", f"{alone.auroc_weighted:.4f}", f"{alone.auprc_weighted:.4f}", "", "")
    console.print()
    console.print(table)
    console.print(
        f"[dim]Data: {description}. The test comparison is made by this harness from the local files; it never went "
        "through the services and lies outside the privacy guarantee.[/dim]"
    )
    if report.privacy is not None:
        facts = report.privacy
        console.print(
            f"Privacy of each patient: {facts.guarantee}, against the centre and {facts.guarantee.colluders} colluding "
            f"hospitals; {facts.attempts} charged attempts have spent {facts.spent}."
        )
    else:
        console.print("Privacy: [yellow]none[/yellow]. This version is marked and can never be promoted.")
    numbers = report.as_dict()
    console.print(
        f"Ran {report.rounds} rounds in {report.wall_s:.0f} s ({report.startup_s:.0f} s start-up) with "
        f"{report.processes} processes, {report.peak_memory_mb / 1024:.1f} GiB at the peak; sealed to committed "
        f"{numbers['round_overhead_s']['p50']:.2f} s (p50), {numbers['round_overhead_s']['p99']:.2f} s (p99); "
        f"{report.audit_entries} audit entries."
    )
    console.print(f"\nLook next (the data stays in {folder} until the next demo):")
    for command, what in (
        ("fedmesh models", "the model versions and how each came to be"),
        ("fedmesh rounds", "every committed round"),
        ("fedmesh audit status", "how far the hospitals have witnessed the audit log"),
        ("fedmesh audit export --out DIR", "the audit log as files"),
        ("fedmesh audit verify DIR", "check them offline"),
        ("fedmesh privacy ledger", "what each hospital spent on its patients"),
    ):
        console.print(f"  [bold]uv run {command}[/bold]  {what}")
