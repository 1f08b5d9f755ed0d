"""`fedmesh bench families`: what plans learn from a folder of diabetes-130 data, each by its own family.

The hospitals' own code trains: every hospital's compiled contribution and share of noise, all of them in every sum, and
the compiled update. Only the services between them are left out. The comparison reads the local files and lies outside
every privacy guarantee; each seed is one release imagined anew.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score, roc_auc_score

from services.common.errors import Code, FedmeshError
from services.demo.datasets import from_folder
from services.demo.run import read_all
from services.hospital_node.noise import training_noise
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.training.trainer import predict
from services.plans.library import plan_names, plan_path
from services.plans.manifest import PlanManifest, load_manifest
from services.tradeoff.simulation import Simulation


@dataclass(frozen=True)
class FamiliesOptions:
    """plans: names of shipped plans or files. test: judge on the test set, else on the validation rows."""

    data: Path
    plans: tuple[str, ...]
    seeds: int
    test: bool
    cache: Path
    report: Path | None


@dataclass(frozen=True)
class Learnt:
    """One plan's figures: areas under ROC and precision-recall curve, mean and standard deviation (ddof 1; 0 for
    one seed) over the seeds."""

    plan: str
    family: str
    guarantee: str
    rounds: int
    coordinates: int
    auroc: float
    auroc_sd: float
    auprc: float
    auprc_sd: float


def run_families(options: FamiliesOptions, console: Console) -> list[Learnt]:
    """Train every plan and print a table.

    Raises: FedmeshError(NOT_FOUND, PLAN_INVALID, DATA_INVALID or PRIVACY_REFUSED).
    """
    plans = [load_manifest(_path(name)) for name in options.plans]
    split = SplitName.TEST if options.test else SplitName.VALIDATION
    found = []
    for plan in plans:
        with console.status(f"{plan.name}: reading, compiling, training {options.seeds} times ..."):
            found.append(learn(plan, options, split))
    _show(console, found, options)
    if options.report is not None:
        options.report.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    return found


def learn(plan: PlanManifest, options: FamiliesOptions, split: SplitName) -> Learnt:
    """Train one plan `seeds` times. Raises: as `run_families`."""
    sets = read_all(from_folder(options.data, plan), plan)
    simulation = Simulation(plan, sets, options.cache)
    guarantee = "none" if plan.privacy is None else str(training_noise(plan, len(sets)).guarantee)
    x, y = _judged(sets, split)
    scores = [predict(plan, simulation.run(plan, lambda: None), x) for _ in range(options.seeds)]
    auroc = np.array([roc_auc_score(y, each) for each in scores])
    auprc = np.array([average_precision_score(y, each) for each in scores])
    ddof = min(1, options.seeds - 1)
    return Learnt(
        plan=plan.name,
        family=f"{plan.model.family} by {plan.algorithm.kind}",
        guarantee=guarantee,
        rounds=plan.rounds.count,
        coordinates=plan.vector_length,
        auroc=float(auroc.mean()),
        auroc_sd=float(auroc.std(ddof=ddof)),
        auprc=float(auprc.mean()),
        auprc_sd=float(auprc.std(ddof=ddof)),
    )


def _path(name: str) -> Path:
    return plan_path(name) if name in plan_names() else Path(name)


def _judged(sets: Sequence[Dataset], split: SplitName) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features and outcomes of all hospitals' rows of a split. Raises: FedmeshError(DATA_INVALID) when one outcome is
    missing."""
    rows = [each.rows(split) for each in sets]
    x, y = np.concatenate([part.x for part in rows]), np.concatenate([part.y for part in rows])
    if len(np.unique(y)) < 2:
        raise FedmeshError(Code.DATA_INVALID, f"the {split.name.lower()} rows do not hold both outcomes")
    return x, y


def _show(console: Console, found: Sequence[Learnt], options: FamiliesOptions) -> None:
    where = "test" if options.test else "validation"
    table = Table(title=f"{where} rows, {options.seeds} run(s): mean (standard deviation)")
    table.add_column("plan", no_wrap=True)
    for heading in ("rounds", "integers", "AUROC", "AUPRC"):
        table.add_column(heading, justify="right")
    for each in found:
        table.add_row(
            each.plan,
            str(each.rounds),
            f"{each.coordinates:,}",
            f"{each.auroc:.4f} ({each.auroc_sd:.4f})",
            f"{each.auprc:.4f} ({each.auprc_sd:.4f})",
        )
    console.print(table)
    for each in found:
        console.print(f"{each.plan}: {each.family}, privacy {each.guarantee}", highlight=False, soft_wrap=True)
    console.print("Read from local files, outside every guarantee; each run is one release imagined anew.")
