"""Runs a plan over a grid of epsilon and says what it found."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from services.common.clock import SystemClock
from services.common.files import require_writable
from services.demo import datasets
from services.demo.datasets import DemoData
from services.demo.evaluation import local_only, pooled, score
from services.hospital_node.domain.policy import plan_loss
from services.hospital_node.noise import training_noise
from services.hospital_node.sources.dataset import Dataset, Rows, SplitName
from services.hospital_node.store.ledger import LedgerRow, read_ledger, read_recoveries
from services.hospital_node.training.cache import compiled_plan
from services.hospital_node.training.trainer import predict
from services.plans.manifest import PlanManifest, plan_id
from services.privacy.budget import DEFAULT_LIMIT, Charge, Remaining, remaining
from services.privacy.noise import NoisePlan
from services.tradeoff import picture, terminal
from services.tradeoff.curve import Curve, Point, Scores, band_of
from services.tradeoff.grid import KEEP, plan_at, require_private, without_privacy
from services.tradeoff.recommendation import recommend
from services.tradeoff.report import Subject, TradeoffReport, write_report
from services.tradeoff.simulation import Simulation
from services.tradeoff.sources import public_folder, read_hospitals

FOLDER: Final = Path(".fedmesh/tradeoff")


@dataclass(frozen=True)
class TradeoffOptions:
    """What the command line chose. data: a folder; None: a synthetic cohort. public: the folder's records are public.
    ledgers: data folders of hospital nodes whose remaining budget counts."""

    plan: PlanManifest
    epsilons: tuple[float, ...]
    data: Path | None = None
    public: bool = False
    hospitals: int = 15
    seeds: int = 5
    keep: float = KEEP
    ledgers: tuple[Path, ...] = ()
    out: Path | None = None
    report: Path | None = None
    folder: Path = FOLDER


def run_tradeoff(options: TradeoffOptions, console: Console) -> TradeoffReport:
    """Simulate, draw, recommend. What takes longest, compiling, is kept in `options.folder` for the next time.

    Raises: FedmeshError: PLAN_INVALID or PRIVACY_REFUSED for a plan without privacy or an epsilon that cannot be had;
        PRIVACY_REFUSED for data that is not public; DATA_INVALID; INVALID_ARGUMENT for files that cannot be written.
    """
    started = time.monotonic()
    require_private(options.plan)
    require_writable(options.out, options.report)
    left = _budgets(options.ledgers)
    # All that can be wrong with the plan is said before anything takes time.
    promised = {epsilon: plan_at(options.plan, epsilon) for epsilon in options.epsilons}
    plain = without_privacy(options.plan)
    with console.status("Preparing the data ..."):
        data = _data(options)
        noise = {epsilon: training_noise(plan, len(data.hospitals)) for epsilon, plan in promised.items()}
        sets = read_hospitals(data, options.plan)
    cache = options.folder / "compiled"
    with console.status("Compiling the plan with TensorFlow Federated, with privacy and without (some 30 s, once) ..."):
        # One after the other on this thread, so that Ctrl-C ends the compiler at once.
        for plan in (options.plan, plain):
            compiled_plan(plan, cache)
    held_out = pooled(sets, SplitName.VALIDATION)
    curve = _measure(options, console, sets, held_out, cache, promised, plain, noise)
    subject = _subject(options.plan, data, held_out, noise)
    delta = plan_loss(options.plan)[1]
    chosen = recommend(curve, options.keep, delta, DEFAULT_LIMIT, left)
    report = TradeoffReport(subject, curve, options.keep, chosen, time.monotonic() - started)
    _deliver(options, console, report)
    return report


def _deliver(options: TradeoffOptions, console: Console, report: TradeoffReport) -> None:
    terminal.show(console, report)
    if options.out is not None:
        picture.draw(report, options.out)
        console.print(f"The picture is {options.out}.", highlight=False, soft_wrap=True)
    if options.report is not None:
        write_report(report, options.report)


def _data(options: TradeoffOptions) -> DemoData:
    if options.data is not None:
        return public_folder(options.data, options.plan, options.public)
    return datasets.synthetic(options.folder / "data" / datasets.SYNTHETIC, options.hospitals)


def _budgets(ledgers: Sequence[Path]) -> dict[str, Remaining]:
    """What each population in the ledgers has left under the default limit.

    Raises: FedmeshError(NOT_FOUND) for a folder without a ledger, and as `read_ledger`.
    """
    now = SystemClock().now()
    charges: list[Charge] = []
    populations: set[str] = set()
    for folder in ledgers:
        rows = read_ledger(folder)
        mine = {row.population for row in rows}
        charges += [_charge(row) for row in rows if row.private and not row.released]
        charges += [Charge("", name, *lost) for name in mine for lost in read_recoveries(folder)]
        populations |= mine
    return {population: remaining(charges, population, now) for population in populations}


def _charge(row: LedgerRow) -> Charge:
    at = row.recovered_at or row.last_charged_at or row.reserved_at
    return Charge(row.job_id, row.population, row.epsilon, row.delta, at)


def _measure(
    options: TradeoffOptions,
    console: Console,
    sets: Sequence[Dataset],
    held_out: Rows,
    cache: Path,
    promised: dict[float, PlanManifest],
    plain: PlanManifest,
    noise: dict[float, NoisePlan],
) -> Curve:
    rounds = len(options.plan.training_rounds)
    # At each epsilon one more, of every hospital alone.
    runs = 1 + len(promised) * (options.seeds + 1)

    def judged(plan: PlanManifest, state: bytes) -> Scores:
        found = score(held_out.y, predict(plan, state, held_out.x), held_out.patients)
        return Scores(found.auroc, found.auprc)

    with _progress(console, runs * rounds) as (round_done, say):
        reference = judged(plain, Simulation(plain, sets, cache).run(plain, round_done))
        say(f"no privacy: AUROC {reference.auroc:.4f}, AUPRC {reference.auprc:.4f}")
        simulation = Simulation(options.plan, sets, cache)
        points = []
        for epsilon, plan in promised.items():
            states = [simulation.run(plan, round_done) for _ in range(options.seeds)]
            own = simulation.alone(plan, noise[epsilon].sigma, round_done)
            scores = [judged(options.plan, state) for state in states]
            points.append(_point(epsilon, noise[epsilon], scores, [judged(options.plan, state) for state in own]))
            say(f"epsilon {epsilon:g}: AUROC {points[-1].auroc.mean:.4f}, AUPRC {points[-1].auprc.mean:.4f}")
    with console.status("Training each hospital alone ..."):
        alone = local_only(sets, held_out)
    return Curve(
        points=tuple(points),
        reference=reference,
        alone=Scores(alone.auroc_mean, alone.auprc_mean),
        prevalence=float(np.mean(held_out.y)),
        runs=options.seeds,
    )


def _point(epsilon: float, noise: NoisePlan, scores: Sequence[Scores], own: Sequence[Scores]) -> Point:
    auroc, auprc = band_of([each.auroc for each in scores]), band_of([each.auprc for each in scores])
    alone = Scores(fmean(each.auroc for each in own), fmean(each.auprc for each in own))
    return Point(epsilon, noise.sum_sigma / noise.sensitivity, auroc, auprc, alone)


@contextmanager
def _progress(console: Console, rounds: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """A bar on a terminal, a line for each finished point elsewhere; what to call after a round and after a point."""
    if not console.is_terminal:
        yield lambda: None, lambda text: console.print(text, highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("Training", total=rounds)
        yield lambda: bar.advance(task), lambda text: bar.update(task, description=text)


def _subject(plan: PlanManifest, data: DemoData, held_out: Rows, noise: dict[float, NoisePlan]) -> Subject:
    assert plan.privacy is not None
    return Subject(
        plan=plan.name,
        plan_id=plan_id(plan),
        stated_epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        colluders=next(iter(noise.values())).guarantee.colluders,
        rounds=plan.rounds.count,
        dataset=data.name,
        synthetic=data.synthetic,
        hospitals=len(data.hospitals),
        encounters=len(held_out.y),
        patients=held_out.patients,
        positives=int(held_out.y.sum()),
    )
