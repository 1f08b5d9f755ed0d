"""A job in one process: the hospital node's own training, clipping and noise, without services and encryption.

What is left out, the masked and encrypted sum, is exact: it changes no integer. Every hospital takes part in every
round.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from services.hospital_node.domain.ports import Int64Vector, NoiseRequest
from services.hospital_node.noise import ShareOfNoise
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.training.trainer import Trainer
from services.plans.manifest import PlanManifest
from services.privacy.noise import discrete_gaussian


class Simulation:
    """Hospitals that train one plan. Noise is drawn from the system's randomness: no two runs are the same."""

    def __init__(self, plan: PlanManifest, sets: Sequence[Dataset], cache: Path) -> None:
        """Raises: FedmeshError: as `Trainer`."""
        self._plan = plan
        self._trainers = [Trainer(plan, data, cache) for data in sets]
        self._noise = ShareOfNoise()

    def run(self, promised: PlanManifest, round_done: Callable[[], None]) -> bytes:
        """The last state of a job, under the noise of `promised`: this plan at some epsilon.

        The graphs that were compiled do not depend on epsilon, so one compilation serves the whole grid.

        Raises: FedmeshError(PRIVACY_REFUSED) when no noise gives the guarantee; WRONG_STATE when training diverged.
        """
        state = self._trainers[0].initial_state()
        with ThreadPoolExecutor(max_workers=min(len(self._trainers), os.cpu_count() or 1)) as pool:
            for number in self._plan.training_rounds:
                total = self._sum(pool, state, NoiseRequest(promised, number, len(self._trainers)))
                state = self._trainers[0].update(state, total, len(self._trainers))
                round_done()
        return state

    def alone(self, promised: PlanManifest, sigma: float, round_done: Callable[[], None]) -> list[bytes]:
        """The last state of each hospital that trains the plan by itself, under noise of its own.

        sigma: standard deviation of that noise in integer units: all of it, for nobody shares it. A hospital's sum
        counts as often as there are hospitals, because the plan divides by the patients of all of them.

        Raises: as `run`.
        """
        states = [self._trainers[0].initial_state() for _ in self._trainers]
        times = len(self._trainers)
        for number in self._plan.training_rounds:
            for index, trainer in enumerate(self._trainers):
                total = trainer.contribution(states[index], number)
                total[: promised.train_length] += discrete_gaussian(sigma, promised.train_length)
                states[index] = trainer.update(states[index], times * total, times)
            round_done()
        return states

    def _sum(self, pool: Executor, state: bytes, request: NoiseRequest) -> Int64Vector:
        def noised(trainer: Trainer) -> Int64Vector:
            return self._noise.add(trainer.contribution(state, request.round), request)

        return np.asarray(np.sum(list(pool.map(noised, self._trainers)), axis=0), dtype=np.int64)
