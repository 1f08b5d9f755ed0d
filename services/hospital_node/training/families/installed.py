"""`installed`: the algorithm of a package that the hospital's admin installed; see `training.packages`."""

from typing import Any

import tensorflow as tf

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.families.base import PatientFamily
from services.hospital_node.training.packages import load_family
from services.plans.algorithms import InstalledFamily
from services.plans.manifest import PlanManifest


class Installed(PatientFamily):
    """Vectors and update are the package's; all that privacy rests on is done here and in `base`."""

    def __init__(self, plan: PlanManifest) -> None:
        """Load the package. Raises: as `packages.load_family`."""
        super().__init__(plan)
        assert isinstance(plan.algorithm, InstalledFamily)
        self._family, self._parameters = load_family(plan.algorithm.family), plan.algorithm.parameters

    def vectors(self, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """The package's function is given one row at a time, so that it cannot mix patients."""

        def one(row: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            vector = self._family.vector(row[0], row[1], weights, self._parameters)
            return self._shaped(vector, self.plan.train_length, "vector")

        return tf.map_fn(one, (x, y), fn_output_signature=tf.TensorSpec([self.plan.train_length], tf.float32))

    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        mean = tf.cast(self.mean(total), tf.float32)
        after = self._family.update(state.weights, state.velocity, mean, self._parameters)
        weights, velocity = (self._shaped(value, self.plan.weights_length, "update") for value in after)
        return {"weights": weights, "velocity": velocity, "average": weights}

    def _shaped(self, value: Any, length: int, function: str) -> tf.Tensor:
        tensor = tf.convert_to_tensor(value)
        if tensor.dtype != tf.float32 or tensor.shape.as_list() != [length]:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"{function} of the installed family returns {tensor.dtype.name} {tensor.shape}, "
                f"not float32 [{length}]",
            )
        return tensor
