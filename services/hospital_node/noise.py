"""The hospital's share of noise, by the plan and by its own calibration.

Calibrating imports dp-accounting and SciPy: a second and 45 MB that a hospital would keep for good. A child process
(`python -m services.hospital_node.noise`) does it, once for all nodes that share the cache. What it leaves there is a
hint: `plan_noise` checks by the closed form that it gives the guarantee.
"""

import fcntl
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import compositions
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.store.files import write_durably
from services.privacy.noise import NoisePlan, discrete_gaussian, plan_noise

_CALIBRATION_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Mechanism:
    """One part of the vector as a release: the arguments of `services.privacy.noise.plan_noise`."""

    epsilon: float
    delta: float
    compositions: int
    sensitivity: int
    dimension: int
    hospitals: int

    def noise(self, multiplier: float | None) -> NoisePlan:
        """Raises: FedmeshError(PRIVACY_REFUSED) when a stated multiplier does not give the guarantee."""
        return plan_noise(
            epsilon=self.epsilon,
            delta=self.delta,
            compositions=self.compositions,
            sensitivity=self.sensitivity,
            dimension=self.dimension,
            hospitals=self.hospitals,
            noise_multiplier=multiplier,
        )


def mechanisms(request: NoiseRequest) -> list[tuple[slice, Mechanism]]:
    """The coordinates that a round releases, and how; the rest of its vector is zero. Empty without privacy."""
    manifest, privacy = request.manifest, request.manifest.privacy
    if privacy is None:
        return []
    attempts, measured = compositions(manifest)
    length, hospitals = manifest.train_length, request.hospitals
    train = Mechanism(privacy.epsilon, privacy.delta, attempts, manifest.train_sensitivity, length, hospitals)
    released = [(slice(0, length), train)]
    metrics = manifest.metrics
    if metrics is not None and request.round in manifest.metrics_rounds:
        if metrics.epsilon is None or metrics.delta is None:
            raise FedmeshError(Code.PRIVACY_REFUSED, "the plan's metrics state no epsilon and delta")
        part = slice(length, manifest.vector_length)
        measure = Mechanism(
            metrics.epsilon,
            metrics.delta,
            measured,
            manifest.metrics_sensitivity,
            manifest.metrics_length,
            hospitals,
        )
        released.append((part, measure))
    return released


class ShareOfNoise:
    """See `domain.ports.NoiseAdder` for the contract."""

    def __init__(self, cache: Path) -> None:
        """cache: folder for calibrated multipliers, which are no secret; made when missing."""
        self._cache = cache
        self._plans: dict[Mechanism, NoisePlan] = {}

    def prepare(self, request: NoiseRequest) -> None:
        for _, mechanism in mechanisms(request):
            # The first draw loads the sampler.
            discrete_gaussian(self.plan(mechanism).share_sigma, 1)

    def add(self, values: Int64Vector, request: NoiseRequest) -> Int64Vector:
        noised = values.copy()
        for part, mechanism in mechanisms(request):
            noised[part] += discrete_gaussian(self.plan(mechanism).share_sigma, mechanism.dimension)
        return noised

    def plan(self, mechanism: Mechanism) -> NoisePlan:
        """The noise of a mechanism, calibrated once.

        Raises: FedmeshError(PRIVACY_REFUSED) when no noise gives the guarantee; INTERNAL when calibrating fails.
        """
        if mechanism not in self._plans:
            self._plans[mechanism] = self._calibrated(mechanism)
        return self._plans[mechanism]

    def _calibrated(self, mechanism: Mechanism) -> NoisePlan:
        question = json.dumps(asdict(mechanism), sort_keys=True)
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._cache / f"noise-{hashlib.sha256(question.encode()).hexdigest()}"
        with (self._cache / "noise.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write_durably(path, _ask(question).hex().encode())
        try:
            multiplier = float.fromhex(path.read_text())
            if not (math.isfinite(multiplier) and multiplier > 0):
                raise ValueError(multiplier)
            return mechanism.noise(multiplier)
        except ValueError as error:
            path.unlink(missing_ok=True)
            raise FedmeshError(Code.INTERNAL, "the cached noise calibration was damaged; it is made anew") from error


def _ask(question: str) -> float:
    """Let a child process calibrate."""
    command = [sys.executable, "-m", "services.hospital_node.noise", question]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CALIBRATION_TIMEOUT_S, check=False
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise FedmeshError(Code.INTERNAL, "calibrating the noise failed") from error
    if "code" in answer:
        raise FedmeshError(Code(answer["code"]), answer["message"])
    return float(answer["multiplier"])


def main(question: str) -> None:
    """Answer one question on standard output."""
    try:
        print(json.dumps({"multiplier": Mechanism(**json.loads(question)).noise(None).noise_multiplier}))
    except FedmeshError as error:
        print(json.dumps({"code": error.code.value, "message": error.message}))


if __name__ == "__main__":
    main(sys.argv[1])
