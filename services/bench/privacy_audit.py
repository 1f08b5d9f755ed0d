"""`fedmesh bench privacy-audit`: attack the noise that hospitals add, and bound the true epsilon from below.

The attacker of the threat model, with everything it may have: the centre and f = 4 of 15 hospitals, exactly t = 11
survivors, the contributions of all other patients, and the state that the round builds on. It asks whether one patient
took part, whose gradient is as long as clipping allows and points along one coordinate: no patient moves a sum further,
and for Gaussian noise the best test is a threshold on the projection onto that direction (Neyman and Pearson). It
subtracts what it knows, its own noise included, and compares with half the patient's contribution.

What is attacked is the node's own path: contributions clipped to integers, `ShareOfNoise.add` with the node's
calibration, sums of integers. Encryption and masks are exact (`fedmesh bench secure-sum`) and left out. Clipping is the
arithmetic of `hospital_node.training.process` in NumPy, which a test compares with it: no TensorFlow is loaded here.
The plan is the shipped private one with a single release, so that all of epsilon is spent on what is attacked, and with
so many features that a vector carries `WIDTH` runs: each coordinate has a canary of its own, with independent noise.

Paired worlds share a run's noise: "with" is "without" plus the canary, as it is for every mechanism that adds noise
which does not look at the data. At most one of a run's two errors then happens, so their sum varies five times less
(variance) than with fresh noise in each world, and far fewer runs tell half the noise from the whole.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.noise import Mechanism, ShareOfNoise, mechanisms
from services.plans.document import validate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest, canonical_bytes
from services.privacy.empirical import chances, claimed_mu, epsilon_of_mu, mu_lower_bound
from services.privacy.noise import NoisePlan
from services.secure_sum.cohort import colluders, threshold

HOSPITALS: Final = 15
WIDTH: Final = 1000
LEAST_RUNS: Final = 2000
_PATIENTS: Final = 20


@dataclass(frozen=True)
class AuditOptions:
    """runs: in each world. confidence: of the bound. noise_factor: multiplies the noise of the honest hospitals."""

    runs: int = 6000
    paired: bool = True
    confidence: float = 0.95
    noise_factor: float = 1.0
    report: Path | None = None


@dataclass(frozen=True)
class AuditReport:
    """What the attack achieved. All but the claims, the chances and `expected_bound` was measured.

    canary: the patient's contribution, integer units; noise_sigma: standard deviation of the honest noise in the sum,
    by the node's calibration and `noise_factor`. epsilon_bound: with the stated confidence the mechanism loses at least
    this much at `delta`. expected_bound: what it would be if the errors were as frequent as the calibration says.
    false_alarm, missed: probabilities that this audit refuses a mechanism as good as claimed, and passes one with half
    the noise.
    """

    epsilon: float
    delta: float
    colluders: int
    hospitals: int
    survivors: int
    runs: int
    worlds: str
    confidence: float
    noise_factor: float
    canary: int
    noise_sigma: float
    false_positives: int
    false_negatives: int
    epsilon_bound: float
    expected_bound: float
    half_noise_epsilon: float
    false_alarm: float
    missed: float
    holds: bool
    seconds: float


class ScaledNoise(ShareOfNoise):
    """The node's noise with another sigma: what a fault in its calibration would look like."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def plan(self, mechanism: Mechanism) -> NoisePlan:
        plan = super().plan(mechanism)
        return replace(plan, share_sigma=self._factor * plan.share_sigma)


def audit_plan() -> PlanManifest:
    """The shipped private plan with one release and a vector of `WIDTH` training coordinates."""
    document: dict[str, Any] = json.loads(canonical_bytes(shipped_plan("readmission-logistic-private")))
    names = [f"x{number}" for number in range(WIDTH - 1)]
    columns = [{"kind": "numeric", "name": name, "minimum": 0, "maximum": 1} for name in names]
    document["feature_schema"] |= {"columns": columns}
    document["privacy"] |= {"extra_attempts": 0}
    document |= {
        "name": "bench-privacy-audit",
        "description": "One release; carries canaries.",
        "features": names,
        "rounds": {"count": 1},
        "metrics": None,
        "checks": None,
    }
    return validate(PlanManifest, document, "the audit's plan", Code.PLAN_INVALID)


def clipped_sum(manifest: PlanManifest, gradients: npt.NDArray[np.float64]) -> Int64Vector:
    """The integers that a hospital's patients add to the sum: int64[weights] from float64[patients, weights].

    The arithmetic of `hospital_node.training.process`: clip, round, check the integer norm, add.
    """
    sensitivity = manifest.train_sensitivity
    bound = sensitivity - math.sqrt(manifest.weights_length) / 2
    scaled = gradients * manifest.encoding.scale
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    integers = np.rint(scaled * np.minimum(1.0, bound / np.maximum(norm, 1e-30))).astype(np.int64)
    within = (integers * integers).sum(axis=1, keepdims=True) <= sensitivity**2
    return np.asarray(np.where(within, integers, 0).sum(axis=0), dtype=np.int64)


class Game:
    """Releases of a round's sum as the attacker sees them. The colluders come first; the last one has the canaries."""

    def __init__(self, plan: PlanManifest, honest_noise: ShareOfNoise) -> None:
        self._request = NoiseRequest(plan, 1, HOSPITALS)
        self._honest_noise, self._own_noise = honest_noise, ShareOfNoise()
        generator = np.random.default_rng()
        shape = (_PATIENTS, plan.weights_length)
        self._known = [clipped_sum(plan, generator.normal(0, 1, shape)) for _ in range(threshold(HOSPITALS))]
        # One patient a coordinate, with a gradient far beyond the bound.
        self.canaries = clipped_sum(plan, 1e6 * np.eye(plan.weights_length))

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the honest noise in a sum, by the calibration, integer units."""
        [(_, mechanism)] = mechanisms(self._request)
        return self._honest_noise.plan(mechanism).share_sigma * math.sqrt(threshold(HOSPITALS) - colluders(HOSPITALS))

    def seen(self, *, canaries: bool) -> Int64Vector:
        """A release less everything that the attacker knows: int64[weights], a run in each coordinate."""
        vectors, collude = list(self._known), colluders(HOSPITALS)
        if canaries:
            vectors[-1] = vectors[-1] + self.canaries
        own = [self._own_noise.add(vector, self._request) for vector in vectors[:collude]]
        honest = [self._honest_noise.add(vector, self._request) for vector in vectors[collude:]]
        return _total([*own, *honest]) - _total([*own, *self._known[collude:]])

    def errors(self, *, paired: bool) -> tuple[int, int]:
        """False positives and false negatives of `WIDTH` runs in each world."""
        without = self.seen(canaries=False)
        with_canaries = without + self.canaries if paired else self.seen(canaries=True)
        # Doubled, so that the threshold is an integer as well.
        false_positives = 2 * without > self.canaries
        false_negatives = 2 * with_canaries <= self.canaries
        return int(false_positives.sum()), int(false_negatives.sum())


def run_privacy_audit(options: AuditOptions, console: Console) -> AuditReport:
    """Attack the noise `options.runs` times in each world, rounded up to whole vectors, and say what that proves.

    Raises: FedmeshError(INVALID_ARGUMENT) for options out of range; PRIVACY_REFUSED for noise too fine for the grid.
    """
    if options.runs < LEAST_RUNS:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--runs {options.runs}: at least {LEAST_RUNS} are needed")
    if not (options.noise_factor > 0 and math.isfinite(options.noise_factor)):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--noise-factor {options.noise_factor:g}: use a factor above 0")
    if not 0 < options.confidence < 1:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--confidence {options.confidence:g}: use one between 0 and 1")
    started = time.monotonic()
    plan = audit_plan()
    game = Game(plan, ScaledNoise(options.noise_factor))
    vectors = math.ceil(options.runs / WIDTH)
    with console.status(f"Attacking {vectors * WIDTH} releases in each world ..."):
        errors = [game.errors(paired=options.paired) for _ in range(vectors)]
    false_positives, false_negatives = (sum(counts) for counts in zip(*errors, strict=True))
    report = _report(options, plan, game, vectors * WIDTH, (false_positives, false_negatives), started)
    _show(console, report)
    if options.report is not None:
        options.report.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _report(
    options: AuditOptions,
    plan: PlanManifest,
    game: Game,
    runs: int,
    errors: tuple[int, int],
    started: float,
) -> AuditReport:
    claim, sigma = plan.privacy, game.noise_sigma
    assert claim is not None
    mu = claimed_mu(claim.epsilon, claim.delta)
    canary = int(game.canaries.max())
    expected = _expected_errors(runs, canary / sigma)
    bound = mu_lower_bound(*errors, runs, options.confidence)
    wrong = chances(runs, mu, 2 * mu, options.confidence, paired=options.paired)
    return AuditReport(
        epsilon=claim.epsilon,
        delta=claim.delta,
        colluders=colluders(HOSPITALS),
        hospitals=HOSPITALS,
        survivors=threshold(HOSPITALS),
        runs=runs,
        worlds="paired" if options.paired else "independent",
        confidence=options.confidence,
        noise_factor=options.noise_factor,
        canary=canary,
        noise_sigma=sigma,
        false_positives=errors[0],
        false_negatives=errors[1],
        epsilon_bound=epsilon_of_mu(bound, claim.delta),
        expected_bound=epsilon_of_mu(mu_lower_bound(expected, expected, runs, options.confidence), claim.delta),
        half_noise_epsilon=epsilon_of_mu(2 * mu, claim.delta),
        false_alarm=wrong.false_alarm,
        missed=wrong.missed,
        holds=bound <= mu,
        seconds=round(time.monotonic() - started, 2),
    )


def _expected_errors(runs: int, mu: float) -> int:
    """Errors of one kind in `runs` runs against Gaussian noise, with the threshold in the middle between the worlds."""
    return round(runs * math.erfc(mu / 2 / math.sqrt(2)) / 2)


def _show(console: Console, report: AuditReport) -> None:
    verdict = "[green]holds[/green]" if report.holds else "[red]is broken[/red]"
    console.print(
        f"The claim (epsilon {report.epsilon:g}, delta {report.delta:g}, f {report.colluders}) {verdict}: with "
        f"{100 * report.confidence:g} % confidence the noise loses at least epsilon {report.epsilon_bound:.3f}.",
        highlight=False,
    )
    console.print(
        f"{report.runs} releases in each of two {report.worlds} worlds, {report.survivors} of {report.hospitals} "
        f"survivors, {report.colluders} of them collude: {report.false_positives} times taken for a member, "
        f"{report.false_negatives} times missed. By the calibration a bound of {report.expected_bound:.3f} was to be "
        f"expected. This audit refuses sound noise with probability {report.false_alarm:.1e} at most, and passes half "
        f"of it (epsilon {report.half_noise_epsilon:.3f}) with probability {report.missed:.1e}.",
        highlight=False,
    )


def _total(vectors: Sequence[Int64Vector]) -> Int64Vector:
    return np.asarray(np.sum(vectors, axis=0), dtype=np.int64)
