"""How many local steps a hospital makes, by its own measured speed. Nothing here leaves the hospital."""

import math
import time
from collections.abc import Callable
from typing import Final

from services.plans.algorithms import FedAvg

# Share of the newest measurement in the estimate: one slow moment must not decide for long.
_NEWEST: Final = 0.5


def accumulated(steps: int, momentum: float) -> float:
    """How often `steps` local steps count a gradient altogether: the 1-norm of FedNova's accumulation vector a.

    With momentum m the i-th of tau gradients counts (1 - m^(tau - i + 1)) / (1 - m) times (Wang et al. 2020, 4.1).
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class StepCount:
    """Steps that fit into `target_s`, between 1 and the plan's `local_steps`.

    clock: seconds, monotonic.
    """

    def __init__(self, algorithm: FedAvg, target_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._algorithm = algorithm
        self._target_s = target_s
        self._clock = clock
        self._step_s: float | None = None
        self._began: tuple[int, float] | None = None

    def begin(self) -> int:
        """The number of steps to make now; the first time one, which is measured."""
        steps = 1
        if self._step_s is not None:
            possible = self._target_s / max(self._step_s, 1e-9)
            steps = max(1, math.floor(min(possible, self._algorithm.local_steps)))
        self._began = steps, self._clock()
        return steps

    def end(self) -> None:
        """The steps are done: learn from what they took."""
        assert self._began is not None
        steps, began = self._began
        measured = (self._clock() - began) / steps
        before = measured if self._step_s is None else self._step_s
        self._step_s = _NEWEST * measured + (1 - _NEWEST) * before

    def scale(self, steps: int) -> float:
        """What a delta of so many steps is multiplied by, to count as much as one of `local_steps`."""
        momentum = self._algorithm.momentum
        return accumulated(self._algorithm.local_steps, momentum) / accumulated(steps, momentum)
