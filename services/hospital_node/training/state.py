"""Model state as bytes: small, deterministic, self-describing.

Layout, little-endian: magic "FMSTATE1", uint64 updates, uint32 weights n, then float32 [n] each of the weights
(intercept last), the momentum slot and the mean of the last iterates, which is the model that is served.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.plans.manifest import PlanManifest

_MAGIC: Final = b"FMSTATE1"
_HEADER: Final = struct.Struct("<8sQI")
# float32 has 24 bits; two machines may round each of some thousand operations differently.
_RELATIVE: Final = 1e-4
_ABSOLUTE: Final = 1e-6


@dataclass(frozen=True)
class State:
    """updates: rounds applied so far; weights, velocity, average: float32 [n], intercept last."""

    updates: int
    weights: NDArray[np.float32]
    velocity: NDArray[np.float32]
    average: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(_MAGIC, self.updates, len(self.weights))
        arrays = (self.weights, self.velocity, self.average)
        return header + b"".join(array.astype("<f4").tobytes() for array in arrays)


def initial_state(manifest: PlanManifest) -> bytes:
    """The state that every hospital starts from: zeros, and the public log-odds as intercept."""
    weights = np.zeros(manifest.weights_length, dtype=np.float32)
    weights[-1] = manifest.logistic.initial_intercept
    return State(updates=0, weights=weights, velocity=np.zeros_like(weights), average=weights).to_bytes()


def read_state(data: bytes, manifest: PlanManifest | None = None) -> State:
    """Parse a state; with a manifest, one of that plan's size.

    Raises: FedmeshError(INVALID_ARGUMENT): not a state, of another size, or with values that are not finite.
    """
    if len(data) < _HEADER.size:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state is shorter than its header")
    magic, updates, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEADER.size + 12 * length or updates >= 1 << 62:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state has the wrong format or length")
    if manifest is not None and length != manifest.weights_length:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"the model state has {length} weights, the plan has {manifest.weights_length}"
        )
    values = np.frombuffer(data, dtype="<f4", offset=_HEADER.size).astype(np.float32).reshape(3, length)
    if not np.isfinite(values).all():
        raise FedmeshError(Code.INVALID_ARGUMENT, "the model state holds values that are not finite: it diverged")
    return State(updates=updates, weights=values[0], velocity=values[1], average=values[2])


def states_close(first: bytes, second: bytes) -> bool:
    """Whether two states are the same up to float rounding: equal sizes and counters, close values.

    Raises: FedmeshError(INVALID_ARGUMENT) when either is not a state.
    """
    a, b = read_state(first), read_state(second)
    if a.updates != b.updates or a.weights.shape != b.weights.shape:
        return False
    return all(
        bool(np.allclose(x, y, rtol=_RELATIVE, atol=_ABSOLUTE))
        for x, y in ((a.weights, b.weights), (a.velocity, b.velocity), (a.average, b.average))
    )
