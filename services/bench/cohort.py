"""A hospital that is light: a small synthetic population of its own for every plan, and training in NumPy.

For benchmarks of many small jobs. Everything but the training is the real node's: ledger, noise, masks, checks.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.attacks import Attacked
from services.hospital_node.domain.ports import Int64Vector
from services.plans.algorithms import GradientDescent
from services.plans.manifest import PlanManifest
from services.transparency.findings import Finding

PATIENTS: Final = 200
Float64Array = npt.NDArray[np.float64]


class CohortTrainer:
    """See `hospital_node.domain.ports.Trainer`. Logistic regression by clipped gradient descent; one encounter each.

    A state is the weights as little-endian float64[vector_length], the intercept last.
    """

    def __init__(self, manifest: PlanManifest, seed: int, hospital: int) -> None:
        if (
            manifest.privacy is None
            or manifest.metrics is not None
            or not isinstance(manifest.algorithm, GradientDescent)
        ):
            raise FedmeshError(
                Code.PLAN_INVALID, "a light hospital trains by private gradient descent, without metrics"
            )
        self._algorithm = manifest.algorithm
        self._length = manifest.vector_length
        self._scale = manifest.encoding.scale
        self._bound = manifest.train_sensitivity
        name = int.from_bytes(manifest.name.encode()[-6:], "big")
        random = np.random.default_rng((seed, hospital, name))
        self._x = random.standard_normal((PATIENTS, self._length))
        self._x[:, -1] = 1.0
        odds = self._x @ np.linspace(-1.0, 1.0, self._length)
        self._y = (random.random(PATIENTS) < 1 / (1 + np.exp(-odds))).astype(np.float64)

    def initial_state(self) -> bytes:
        return bytes(8 * self._length)

    def contribution(self, state: bytes, round_number: int) -> Int64Vector:
        error = 1 / (1 + np.exp(-(self._x @ _weights(state)))) - self._y
        gradients = self._scale * error[:, None] * self._x
        norms = np.linalg.norm(gradients, axis=1, keepdims=True)
        # Towards zero, so that rounding lengthens no vector.
        clipped = np.trunc(gradients * np.minimum(1.0, self._bound / np.maximum(norms, 1.0)))
        total: Int64Vector = clipped.astype(np.int64).sum(axis=0)
        return total

    def update(self, state: bytes, total: Int64Vector, contributors: int) -> bytes:
        step = self._algorithm.learning_rate / (self._scale * self._algorithm.expected_patients)
        return (_weights(state) - step * total).astype("<f8").tobytes()

    def metrics(self, total: Int64Vector) -> dict[str, float | None]:
        return {}

    def states_close(self, a: bytes, b: bytes) -> bool:
        return bool(np.allclose(_weights(a), _weights(b), rtol=1e-9, atol=1e-12))

    def personalise(self, state: bytes) -> bytes:
        raise FedmeshError(Code.WRONG_STATE, "a light hospital makes no personal models")

    def attack(self, state: bytes) -> tuple[Attacked, ...]:
        raise FedmeshError(Code.WRONG_STATE, "a light hospital's plan has no checks")

    def findings(self, peaks: Mapping[int, float], measured: Int64Vector) -> tuple[Finding, ...]:
        raise FedmeshError(Code.WRONG_STATE, "a light hospital's plan has no checks")


def _weights(state: bytes) -> Float64Array:
    return np.frombuffer(state, dtype="<f8")
