"""`fedmesh bench training`: what the hospitals' side by side work saves against training on the pooled data.

In a round every hospital trains on its own rows at the same time, so the round lasts as long as its slowest hospital:
contribution, its share of the noise, and the update of the model. Training on the pooled data is the same plan with
all rows at one place. Both run here one after the other on one core, and CPU seconds of the process are counted, which
other processes of the machine hardly change. Reading the data, encryption, and the network are left out: `fedmesh bench
hospital` and `bench secure-sum` have them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from services.common.errors import Code, FedmeshError
from services.demo import datasets
from services.demo.datasets import DemoData
from services.demo.run import read_all
from services.hospital_node.domain.ports import NoiseRequest
from services.hospital_node.noise import ShareOfNoise
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.training.trainer import Trainer
from services.plans.library import plan_named
from services.plans.manifest import PlanManifest

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrainingOptions:
    """data: a folder with diabetes-130 files; None: a synthetic cohort of `hospitals`."""

    folder: Path
    plan: str
    data: Path | None = None
    hospitals: int = 15
    report: Path | None = None


@dataclass(frozen=True)
class TrainingReport:
    """CPU seconds of all rounds. critical_path_s: sum over the rounds of the slowest hospital's. hospital_mean_s: of a
    hospital on average. ratio: pooled_s / critical_path_s. largest_share: of the training rows, at one hospital; its
    inverse bounds the ratio from above."""

    plan: str
    dataset: str
    synthetic: bool
    hospitals: int
    rounds: int
    training_encounters: int
    largest_share: float
    critical_path_s: float
    hospital_mean_s: float
    pooled_s: float
    ratio: float


def run_training(options: TrainingOptions, console: Console) -> TrainingReport:
    """Measure and print. Raises: FedmeshError: PLAN_INVALID, DATA_INVALID, or as compiling and training do."""
    plan = plan_named(options.plan)
    _ = plan.network
    with console.status("Preparing the data ..."):
        data = _data(options, plan)
        sets = read_all(data, plan)
    cache = options.folder / "compiled"
    with console.status("Compiling the plan with TensorFlow Federated (some 15 s, once) ..."):
        trainers = [Trainer(plan, each, cache) for each in sets]
        together = Trainer(plan, pooled_dataset(sets), cache)
    with console.status("Training at the hospitals, then on the pooled data ..."):
        hospital_s = federated_seconds(plan, trainers)
        pooled_s = pooled_seconds(plan, together, len(sets))
    report = _report(plan, data, sets, hospital_s, pooled_s)
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    _show(console, report)
    return report


def _data(options: TrainingOptions, plan: PlanManifest) -> DemoData:
    if options.data is not None:
        return datasets.from_folder(options.data, plan)
    return datasets.synthetic(options.folder / "data" / datasets.SYNTHETIC, options.hospitals)


def _report(
    plan: PlanManifest, data: DemoData, sets: Sequence[Dataset], hospital_s: Seconds, pooled_s: float
) -> TrainingReport:
    rows = [int(np.sum(each.split == SplitName.TRAIN)) for each in sets]
    critical_path_s = float(hospital_s.max(axis=1).sum())
    return TrainingReport(
        plan=plan.name,
        dataset=data.name,
        synthetic=data.synthetic,
        hospitals=len(sets),
        rounds=plan.rounds.count,
        training_encounters=sum(rows),
        largest_share=max(rows) / sum(rows),
        critical_path_s=critical_path_s,
        hospital_mean_s=float(hospital_s.mean(axis=1).sum()),
        pooled_s=pooled_s,
        ratio=pooled_s / critical_path_s,
    )


def federated_seconds(plan: PlanManifest, trainers: Sequence[Trainer]) -> Seconds:
    """CPU seconds of each hospital in each round: float64[rounds, hospitals]."""
    noise, state = ShareOfNoise(), trainers[0].initial_state()
    seconds = np.zeros((plan.rounds.count, len(trainers)))
    for number in range(1, plan.rounds.count + 1):
        request, vectors = NoiseRequest(plan, number, len(trainers)), []
        for position, trainer in enumerate(trainers):
            started = time.process_time()
            vectors.append(noise.add(trainer.contribution(state, number), request))
            seconds[number - 1, position] = time.process_time() - started
        total = np.asarray(np.sum(vectors, axis=0), dtype=np.int64)
        started = time.process_time()
        state = trainers[0].update(state, total, len(trainers))
        # Every hospital computes the update.
        seconds[number - 1] += time.process_time() - started
    return seconds


def pooled_seconds(plan: PlanManifest, trainer: Trainer, hospitals: int) -> float:
    """CPU seconds of all rounds where all rows are at one place: nobody adds noise there, nobody waits."""
    state, started = trainer.initial_state(), time.process_time()
    for number in range(1, plan.rounds.count + 1):
        state = trainer.update(state, trainer.contribution(state, number), hospitals)
    return time.process_time() - started


def pooled_dataset(sets: Sequence[Dataset]) -> Dataset:
    """All rows as one hospital's; patients of different hospitals stay different ones.

    Raises: FedmeshError(INVALID_ARGUMENT) without any.
    """
    if not sets:
        raise FedmeshError(Code.INVALID_ARGUMENT, "there is no hospital to pool")
    patient, before = [], np.zeros(len(SplitName), dtype=np.int64)
    for each in sets:
        patient.append(each.patient + before[each.split])
        before += [each.rows(side).patients for side in SplitName]
    first = sets[0]
    return Dataset(
        feature_names=first.feature_names,
        x=np.concatenate([each.x for each in sets]),
        y=np.concatenate([each.y for each in sets]),
        patient=np.concatenate(patient),
        split=np.concatenate([each.split for each in sets]),
        encounter_ids=np.concatenate([each.encounter_ids for each in sets]),
        patient_ids=np.concatenate([each.patient_ids for each in sets]),
        content_sha256=first.content_sha256,
        rows_read=first.rows_read,
        rows_excluded=first.rows_excluded,
        rows_elsewhere=0,
    )


def _show(console: Console, report: TrainingReport) -> None:
    kind = "a SYNTHETIC cohort" if report.synthetic else f"{report.dataset}, hospitals by a synthetic partition"
    console.print(
        f"[bold]{report.ratio:.2f} x[/bold]: {report.plan}, {report.rounds} rounds on {kind}. On one core the pooled "
        f"{report.training_encounters:,} training encounters take {report.pooled_s:.3f} s of CPU; {report.hospitals} "
        f"hospitals side by side take {report.critical_path_s:.3f} s on their critical path, the slowest hospital of "
        f"each round (a hospital on average {report.hospital_mean_s:.3f} s). The largest hospital has "
        f"{report.largest_share:.0%} of the rows: no plan can be more than {1 / report.largest_share:.1f} x. Reading, "
        "encryption and network are not in it.",
        highlight=False,
    )
