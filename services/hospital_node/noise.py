"""The hospital's share of noise, by the plan and by its own calibration."""

from dataclasses import dataclass

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import compositions
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.plans.manifest import PlanManifest
from services.privacy.noise import NoisePlan, discrete_gaussian, plan_noise


@dataclass(frozen=True)
class Mechanism:
    """One part of the vector as a release: the arguments of `services.privacy.noise.plan_noise`."""

    epsilon: float
    delta: float
    compositions: int
    sensitivity: int
    dimension: int
    hospitals: int
    colluders: int | None = None

    def noise(self) -> NoisePlan:
        """Raises: FedmeshError(PRIVACY_REFUSED) when no noise gives the guarantee."""
        return plan_noise(
            epsilon=self.epsilon,
            delta=self.delta,
            compositions=self.compositions,
            sensitivity=self.sensitivity,
            dimension=self.dimension,
            hospitals=self.hospitals,
            colluders=self.colluders,
        )


def mechanisms(request: NoiseRequest) -> list[tuple[slice, Mechanism]]:
    """The coordinates that a round releases, and how; the rest of its vector is zero. Empty without privacy."""
    manifest, privacy = request.manifest, request.manifest.privacy
    if privacy is None:
        return []
    attempts, measured = compositions(manifest)
    length, hospitals, f = manifest.train_length, request.hospitals, privacy.colluders
    if request.round == manifest.measuring_round:
        return _measuring(request, attempts, measured)
    train = Mechanism(privacy.epsilon, privacy.delta, attempts, manifest.summed_sensitivity, length, hospitals, f)
    released = [(slice(0, length), train)]
    metrics = manifest.metrics
    if metrics is not None and request.round in manifest.metrics_rounds:
        if metrics.epsilon is None or metrics.delta is None:
            raise FedmeshError(Code.PRIVACY_REFUSED, "the plan's metrics state no epsilon and delta")
        part = slice(length, length + manifest.metrics_length)
        measure = Mechanism(
            metrics.epsilon,
            metrics.delta,
            measured,
            manifest.metrics_sensitivity,
            manifest.metrics_length,
            hospitals,
            f,
        )
        released.append((part, measure))
    return released


def _measuring(request: NoiseRequest, attempts: int, measured: int) -> list[tuple[slice, Mechanism]]:
    """The measuring round: metrics and subgroups of the validation patients, histograms of the training patients.

    The latter take the place of a gradient: as many releases as the plan has rounds and spare attempts, under one noise
    multiplier, whatever their sensitivities. The training part is zero.
    """
    manifest, privacy, metrics = request.manifest, request.manifest.privacy, request.manifest.metrics
    if privacy is None or metrics is None or metrics.epsilon is None or metrics.delta is None:
        raise FedmeshError(Code.PRIVACY_REFUSED, "the plan's metrics state no epsilon and delta")
    members = manifest.vector_length - manifest.members_length
    seen = members - manifest.train_length
    validation = Mechanism(
        metrics.epsilon,
        metrics.delta,
        measured,
        manifest.measured_sensitivity,
        seen,
        request.hospitals,
        privacy.colluders,
    )
    training = Mechanism(
        privacy.epsilon,
        privacy.delta,
        attempts,
        manifest.members_sensitivity,
        manifest.members_length,
        request.hospitals,
        privacy.colluders,
    )
    return [
        (slice(manifest.train_length, members), validation),
        (slice(members, manifest.vector_length), training),
    ]


def training_noise(manifest: PlanManifest, hospitals: int) -> NoisePlan:
    """The noise of a private plan's training part, and with it the guarantee that is stated for the plan.

    Raises: FedmeshError(PRIVACY_REFUSED) when no noise gives the guarantee.
    """
    [(_, mechanism), *_] = mechanisms(NoiseRequest(manifest, 1, hospitals))
    return mechanism.noise()


class ShareOfNoise:
    """See `domain.ports.NoiseAdder` for the contract."""

    def __init__(self) -> None:
        self._plans: dict[Mechanism, NoisePlan] = {}

    def add(self, values: Int64Vector, request: NoiseRequest) -> Int64Vector:
        noised = values.copy()
        for part, mechanism in mechanisms(request):
            noised[part] += discrete_gaussian(self.plan(mechanism).share_sigma, mechanism.dimension)
        return noised

    def plan(self, mechanism: Mechanism) -> NoisePlan:
        """The noise of a mechanism, calibrated once.

        Raises: FedmeshError(PRIVACY_REFUSED) when no noise gives the guarantee.
        """
        if mechanism not in self._plans:
            self._plans[mechanism] = mechanism.noise()
        return self._plans[mechanism]
