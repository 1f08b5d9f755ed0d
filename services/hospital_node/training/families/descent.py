"""`gradient_descent`: one full-batch gradient step a round; with privacy, DP gradient descent."""

from typing import Any

import tensorflow as tf

from services.hospital_node.training.families.base import PatientFamily
from services.hospital_node.training.networks import penalty, row_gradients
from services.plans.algorithms import GradientDescent


class Descent(PatientFamily):
    """A patient's vector is the gradient of the log loss of its encounters."""

    def vectors(self, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        return row_gradients(self.plan, x, y, weights)

    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        algorithm = self.plan.algorithm
        assert isinstance(algorithm, GradientDescent)
        direction = tf.cast(self.mean(total), tf.float32) + penalty(self.plan) * state.weights
        velocity = algorithm.momentum * state.velocity + direction
        weights = state.weights - algorithm.learning_rate * velocity
        average = self._average(state, weights, algorithm.average_last)
        return {"weights": weights, "velocity": velocity, "average": average}

    def _average(self, state: Any, weights: tf.Tensor, window: int) -> tf.Tensor:
        """Mean of the iterates since the averaging window opened; the iterate itself before and at its first one."""
        inside = tf.maximum(state.updates + 1 - (self.plan.rounds.count - window), 1)
        # In this form a window of one gives the iterate exactly.
        share = 1.0 / tf.cast(inside, tf.float32)
        return weights * share + state.average * (1.0 - share)
