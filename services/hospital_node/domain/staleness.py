"""What training came to, and what a round makes of it: the contribution with its staleness weight."""

from dataclasses import dataclass, field

import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.domain.tasks import AttemptId, Task
from services.plans.algorithms import LocalTraining
from services.plans.manifest import MAX_HOSPITALS, PlanManifest
from services.plans.staleness import weight_units


@dataclass(frozen=True)
class Trained:
    """The result of training on one version: int64[vector_length], clipped, neither weighted nor noised.

    attempts: those that were begun with it. It may go into one version only.
    """

    version: int
    values: Int64Vector = field(repr=False)
    attempts: set[AttemptId] = field(default_factory=set)

    def age(self, task: Task) -> int:
        """Versions made since the one it was trained on."""
        return task.base_version - self.version

    def elsewhere(self, attempt: AttemptId) -> list[AttemptId]:
        """The attempts at other rounds that were begun with it, oldest first."""
        return sorted(other for other in self.attempts if other.round != attempt.round)


def training_round(manifest: PlanManifest, attempt: AttemptId) -> int:
    """The round that training is told of, which decides whether it measures too.

    An asynchronous result is made before it is known which round it goes into: it always measures, and `contribution`
    leaves the metrics out.
    """
    return manifest.rounds.count if manifest.rounds.asynchronous else attempt.round


def contribution(manifest: PlanManifest, trained: Trained, age: int, round_number: int) -> Int64Vector:
    """The hospital's part of a round's sum, before noise.

    Synchronous: the result as it is. Asynchronous: the training part times floor(64 / sqrt(1 + age)), exactly. A number
    of training rows counts in full, so that weights shorten the step and do not only shift it between hospitals. The
    metrics part has no weight; outside of metrics rounds it is zero, whatever the data.

    Raises: FedmeshError(WRONG_STATE) when the training part would not fit its lane; with privacy it is clipped instead,
        which only brings two neighbouring data sets closer.
    """
    values = trained.values
    if not manifest.rounds.asynchronous:
        return values
    units = manifest.weight_units
    train, metrics = values[: manifest.train_length], values[manifest.train_length :]
    limit = (1 << (manifest.encoding.bits - 1)) // MAX_HOSPITALS // units
    if manifest.privacy is not None:
        train = np.clip(train, -limit + 1, limit - 1)
    elif bool(np.any(np.abs(train) >= limit)):
        raise FedmeshError(
            Code.WRONG_STATE, "encoding.scale is too large: the contribution with its staleness weight exceeds its lane"
        )
    weights = np.full(len(train), weight_units(age), dtype=np.int64)
    if isinstance(manifest.algorithm, LocalTraining):
        weights[manifest.weights_length :] = units
    measured = int(round_number in manifest.metrics_rounds)
    return np.concatenate([train * weights, metrics * measured])
