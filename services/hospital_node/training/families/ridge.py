"""`ridge`: one-shot ridge regression from sufficient statistics."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from services.hospital_node.training.families.base import PatientFamily
from services.plans.algorithms import Ridge


class OneShotRidge(PatientFamily):
    """A patient's vector is the upper triangle of X'X, then X'(y - p) times `moment_weight`; X ends in ones.

    Clipping scales a patient's X'X and X'(y - p) alike: it weights the patient in the regression, and biases nothing
    else.
    """

    @property
    def ridge(self) -> Ridge:
        assert isinstance(self.plan.algorithm, Ridge)
        return self.plan.algorithm

    @property
    def rate(self) -> float:
        """The public rate of the outcome, p."""
        return 1.0 / (1.0 + math.exp(-self.plan.network.initial_intercept))

    def vectors(self, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        ones = tf.concat([x, tf.ones_like(x[:, :1])], axis=1)
        rows, columns = np.triu_indices(self.plan.weights_length)
        gram = tf.gather(ones, rows, axis=1) * tf.gather(ones, columns, axis=1)
        return tf.concat([gram, self.ridge.moment_weight * ones * (y - self.rate)[:, tf.newaxis]], axis=1)

    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        """The minimiser of the mean over the expected patients of (y - p - x w)^2 / 2, plus l2 / 2 |w|^2 (the intercept
        is free), divided by the slope p (1 - p) of the logistic function, on top of the public intercept.

        Noise can leave a matrix that is not positive definite: eigenvalues below l2 are raised to it.
        """
        size, l2 = self.plan.weights_length, self.plan.network.l2
        mean = self.mean(total)
        pairs = size * (size + 1) // 2
        # Position in the triangle of every entry of the symmetric matrix.
        place = np.zeros((size, size), dtype=np.int64)
        place[np.triu_indices(size)] = np.arange(pairs)
        place = np.maximum(place, place.T)
        matrix = tf.gather(mean[:pairs], place) + tf.linalg.diag(tf.constant([l2] * (size - 1) + [0.0], tf.float64))
        values, vectors = tf.linalg.eigh(matrix)
        moment = mean[pairs:] / self.ridge.moment_weight
        solution = tf.linalg.matvec(
            vectors, tf.linalg.matvec(vectors, moment, transpose_a=True) / tf.maximum(values, l2)
        )
        start = tf.constant([0.0] * (size - 1) + [self.plan.network.initial_intercept], tf.float64)
        weights = tf.cast(start + solution / (self.rate * (1.0 - self.rate)), tf.float32)
        return {"weights": weights, "velocity": state.velocity, "average": weights}
