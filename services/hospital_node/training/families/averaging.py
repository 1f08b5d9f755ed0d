"""`fedavg`, `fedprox`, `fedadam`, `fedyogi`: several local steps at each hospital, then one step of the server.

They differ in what a local step minimises (`fedprox`) and in what the server does with the mean movement.
"""

from typing import Any

import tensorflow as tf

from services.hospital_node.training.families.base import Family, saturated
from services.hospital_node.training.networks import penalty, total_gradient
from services.plans.algorithms import AdaptiveServer, FedAvg, FedProx, LocalTraining


class Averaging(Family):
    """Local gradient steps; the server applies the mean movement with momentum."""

    @property
    def training(self) -> LocalTraining:
        assert isinstance(self.plan.algorithm, LocalTraining)
        return self.plan.algorithm

    def contribution(self, data: Any, state: Any) -> tf.Tensor:
        """n_k * (local weights - shared weights), then n_k, in integer units: int64 [weights + 1]."""
        rows = tf.cast(tf.shape(data.y)[0], tf.float32)
        factors = penalty(self.plan)
        # FedProx pulls towards the shared weights; a pull of 0 adds an exact zero.
        pull = self.training.mu if isinstance(self.training, FedProx) else 0.0

        def step(number: tf.Tensor, weights: tf.Tensor, velocity: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            gradient = total_gradient(self.plan, data.x, data.y, weights) / tf.maximum(rows, 1.0) + factors * weights
            velocity = self.training.momentum * velocity + gradient + pull * (weights - state.weights)
            return number + 1, weights - self.training.learning_rate * velocity, velocity

        paced = self.plan.target_s is not None
        steps = tf.cast(data.steps, tf.int32) if paced else self.training.local_steps
        _, weights, _ = tf.while_loop(
            lambda number, *_: number < steps,
            step,
            (tf.constant(0), state.weights, tf.zeros_like(state.weights)),
        )
        movement = tf.cast(weights - state.weights, tf.float64) * tf.cast(rows, tf.float64)
        if paced:
            movement *= tf.cast(data.scale, tf.float64)
        movement = saturated(movement * self.plan.encoding.scale, self.plan.encoding.bits)
        return tf.concat([movement, [tf.cast(rows, tf.int64)]], axis=0)

    def movement(self, total: tf.Tensor) -> tf.Tensor:
        """The mean movement of all rows' hospitals: float64 [weights]. The last coordinate counts rows, unscaled."""
        # In asynchronous rounds a contribution of weight 1 counts this often, and so do the rows.
        units = self.plan.weight_units
        rows = tf.maximum(tf.cast(total[-1], tf.float64) / units, 1.0)
        return tf.cast(total[:-1], tf.float64) / (self.plan.encoding.scale * units) / rows

    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        algorithm = self.training
        assert isinstance(algorithm, FedAvg | FedProx)
        velocity = algorithm.server_momentum * state.velocity - tf.cast(self.movement(total), tf.float32)
        weights = state.weights - algorithm.server_learning_rate * velocity
        return {"weights": weights, "velocity": velocity, "average": weights}


class Adam(Averaging):
    """The server of Reddi et al. (2021), algorithm 2.

    In float64 from exact integers, so that machines that round differently agree on every sign in Yogi's rule.
    """

    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        algorithm = self.training
        assert isinstance(algorithm, AdaptiveServer)
        movement = self.movement(total)
        first = algorithm.beta1 * tf.cast(state.velocity, tf.float64) + (1.0 - algorithm.beta1) * movement
        second = self.second(algorithm, tf.cast(state.squares, tf.float64), movement * movement)
        step = algorithm.server_learning_rate * first / (tf.sqrt(second) + algorithm.tau)
        weights = tf.cast(tf.cast(state.weights, tf.float64) + step, tf.float32)
        return {
            "weights": weights,
            "velocity": tf.cast(first, tf.float32),
            "average": weights,
            "squares": tf.cast(second, tf.float32),
        }

    def second(self, algorithm: AdaptiveServer, before: tf.Tensor, square: tf.Tensor) -> tf.Tensor:
        """The second moment after a movement of this square: float64 [weights]."""
        return algorithm.beta2 * before + (1.0 - algorithm.beta2) * square


class Yogi(Adam):
    """FedYogi's second moment."""

    def second(self, algorithm: AdaptiveServer, before: tf.Tensor, square: tf.Tensor) -> tf.Tensor:
        return before - (1.0 - algorithm.beta2) * square * tf.sign(before - square)
