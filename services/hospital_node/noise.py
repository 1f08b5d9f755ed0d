"""The hospital's share of noise, by the plan and by its own calibration.

Calibrating imports dp-accounting and SciPy: a second and 45 MB, in every hospital. A child process does it, once for
all nodes that share the cache; what it answers is only a hint, which `plan_noise` checks by the closed form.
"""

import argparse
import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain import policy
from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.store.files import write_durably
from services.plans.manifest import PlanManifest
from services.privacy.accounting import calibrate
from services.privacy.noise import NoisePlan, discrete_gaussian, plan_noise

_CALIBRATION_TIMEOUT_S: Final = 120.0
_CALIBRATION_VERSION: Final = 1


class ShareOfNoise:
    """See `domain.ports.NoiseAdder` for the contract."""

    def __init__(self, cache: Path) -> None:
        """cache: folder for calibrated multipliers, which are not secret."""
        self._cache = cache
        self._plans: dict[tuple[str, int, int, int], NoisePlan] = {}

    def __call__(self, values: Int64Vector, request: NoiseRequest) -> Int64Vector:
        if request.manifest.privacy is None:
            return values
        noised = values.copy()
        for part, plan in self.parts(request):
            noised[part] += discrete_gaussian(plan.share_sigma, part.stop - part.start)
        return noised

    def parts(self, request: NoiseRequest) -> list[tuple[slice, NoisePlan]]:
        """The coordinates that a round releases and the noise of each part; the rest of the vector is zero.

        Raises: FedmeshError(PRIVACY_REFUSED); INTERNAL when calibrating fails.
        """
        manifest, privacy = request.manifest, request.manifest.privacy
        if privacy is None:
            return []
        attempts, measured = policy.compositions(manifest)
        train = slice(0, manifest.train_length)
        plan = self._plan(
            privacy.epsilon, privacy.delta, attempts, manifest.train_sensitivity, train.stop, request.hospitals
        )
        parts = [(train, plan)]
        metrics = manifest.metrics
        if metrics is not None and request.round in manifest.metrics_rounds:
            part = slice(manifest.train_length, manifest.vector_length)
            epsilon, delta = _promised(manifest)
            parts.append(
                (
                    part,
                    self._plan(
                        epsilon,
                        delta,
                        measured,
                        manifest.metrics_sensitivity,
                        part.stop - part.start,
                        request.hospitals,
                    ),
                )
            )
        return parts

    def _plan(
        self, epsilon: float, delta: float, compositions: int, sensitivity: int, dimension: int, hospitals: int
    ) -> NoisePlan:
        multiplier = self._multiplier(epsilon, delta, compositions)
        return plan_noise(
            epsilon=epsilon,
            delta=delta,
            compositions=compositions,
            sensitivity=sensitivity,
            dimension=dimension,
            hospitals=hospitals,
            noise_multiplier=multiplier,
        )
