"""Model state as bytes: small, deterministic, self-describing.

Layout, little-endian: magic "FMSTATE1", uint64 updates, uint32 weights n, then float32 [n] each of the weights
(intercept last), the momentum slot and the mean of the last iterates, which is the model that is served; with an
adaptive server optimizer also its second moment.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.plans.algorithms import AdaptiveServer
from services.plans.manifest import PlanManifest
from services.plans.models import MlpModel

_MAGIC: Final = b"FMSTATE1"
_HEADER: Final = struct.Struct("<8sQI")
# float32 has 24 bits; two machines may round each of some thousand operations differently.
_RELATIVE: Final = 1e-4
_ABSOLUTE: Final = 1e-6


@dataclass(frozen=True)
class State:
    """updates: rounds applied so far; the arrays: float32 [n], intercept last; squares: the second moment, or None."""

    updates: int
    weights: NDArray[np.float32]
    velocity: NDArray[np.float32]
    average: NDArray[np.float32]
    squares: NDArray[np.float32] | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.float32], ...]:
        arrays = (self.weights, self.velocity, self.average)
        return arrays if self.squares is None else (*arrays, self.squares)

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(_MAGIC, self.updates, len(self.weights))
        return header + b"".join(array.astype("<f4").tobytes() for array in self.arrays)


def initial_state(manifest: PlanManifest) -> bytes:
    """The state that every hospital starts from; it follows from the plan alone."""
    weights, algorithm = initial_weights(manifest), manifest.algorithm
    squares = np.full_like(weights, algorithm.tau**2) if isinstance(algorithm, AdaptiveServer) else None
    return State(0, weights, np.zeros_like(weights), weights, squares).to_bytes()


def initial_weights(manifest: PlanManifest) -> NDArray[np.float32]:
    """Matrices of hidden models by their seed, all else 0 but the intercept, the public log-odds: float32 [n].

    The draws are SHAKE-256 of seed and layer, so that every machine and every version of NumPy has the same ones.
    """
    parts, model = [], manifest.network
    for number, (inputs, outputs) in enumerate(model.layers(len(manifest.feature_names))):
        matrix = np.zeros(inputs * outputs)
        if isinstance(model, MlpModel):
            draws = hashlib.shake_256(f"fedmesh/mlp/{model.seed}/{number}".encode()).digest(4 * inputs * outputs)
            uniform = (np.frombuffer(draws, dtype="<u4") + 0.5) / 2.0**32
            matrix = (2 * uniform - 1) * math.sqrt(6 / (inputs + outputs))
        parts += [matrix, np.zeros(outputs)]
    weights = np.concatenate(parts).astype(np.float32)
    weights[-1] = model.initial_intercept
    return weights


def read_state(data: bytes, manifest: PlanManifest | None = None) -> State:
    """Parse a state; with a manifest, one of that plan's size.

    Raises: FedmeshError(INVALID_ARGUMENT): not a state, of another size, or with values that are not finite.
    """
    if len(data) < _HEADER.size:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state is shorter than its header")
    magic, updates, length = _HEADER.unpack_from(data)
    arrays = {_HEADER.size + 4 * number * length: number for number in (3, 4)}.get(len(data))
    if magic != _MAGIC or length == 0 or arrays is None or updates >= 1 << 62:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state has the wrong format or length")
    if manifest is not None and length != manifest.weights_length:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"the model state has {length} weights, the plan has {manifest.weights_length}"
        )
    if manifest is not None and (arrays == 4) != manifest.algorithm.second_moment:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"the model state is not one of {manifest.algorithm.kind!r}")
    values = np.frombuffer(data, dtype="<f4", offset=_HEADER.size).astype(np.float32).reshape(arrays, length)
    if not np.isfinite(values).all():
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state holds values that are not finite: it diverged")
    return State(updates, *values)


def states_close(first: bytes, second: bytes) -> bool:
    """Whether two states are the same up to float rounding: equal sizes and counters, close values.

    Raises: FedmeshError(INVALID_ARGUMENT) when either is not a state.
    """
    a, b = read_state(first), read_state(second)
    if a.updates != b.updates or a.weights.shape != b.weights.shape or len(a.arrays) != len(b.arrays):
        return False
    # The fourth is of the order of squares of the others.
    tolerances = (_ABSOLUTE, _ABSOLUTE, _ABSOLUTE, _ABSOLUTE**2)
    return all(
        bool(np.allclose(x, y, rtol=_RELATIVE, atol=absolute))
        for x, y, absolute in zip(a.arrays, b.arrays, tolerances, strict=False)
    )
