"""The models of `services.plans.models` as TensorFlow graphs: scores and gradients. See `scoring` for NumPy.

Only the compile process loads this module. Weights are one float32 vector [n] in the layout of `plans.models.Network`.
"""

from typing import Any

import tensorflow as tf

from services.plans.manifest import PlanManifest
from services.plans.models import MlpModel


def log_odds(plan: PlanManifest, x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Scores of rows x, float32 [rows, features]: float32 [rows]."""
    return _forward(plan, x, weights)[1]


def row_gradients(plan: PlanManifest, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Gradient of each row's log loss: float32 [rows, n]."""
    parts: list[tf.Tensor] = []
    for inputs, errors in _backward(plan, x, y, weights):
        outer = inputs[:, :, tf.newaxis] * errors[:, tf.newaxis, :]
        parts += [tf.reshape(outer, [-1, inputs.shape[1] * errors.shape[1]]), errors]
    return tf.concat(parts, axis=1)


def total_gradient(plan: PlanManifest, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Gradient of the sum of all rows' log losses, float32 [n], without forming those of single rows."""
    parts: list[tf.Tensor] = []
    for inputs, errors in _backward(plan, x, y, weights):
        ones = tf.ones_like(inputs[:, :1])
        product = tf.linalg.matmul(tf.concat([inputs, ones], axis=1), errors, transpose_a=True)
        parts.append(tf.reshape(product, [-1]))
    return tf.concat(parts, axis=0)


def penalty(plan: PlanManifest) -> tf.Tensor:
    """The ridge factor of each parameter, float32 [n]: `l2`; biases have none."""
    factors: list[float] = []
    for inputs, outputs in plan.network.layers(len(plan.feature_names)):
        factors += [plan.network.l2] * (inputs * outputs) + [0.0] * outputs
    return tf.constant(factors, tf.float32)


def _layers(plan: PlanManifest, weights: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Matrix [inputs, outputs] and biases [outputs] of every layer."""
    found, start = [], 0
    for inputs, outputs in plan.network.layers(len(plan.feature_names)):
        stop = start + inputs * outputs
        found.append((tf.reshape(weights[start:stop], [inputs, outputs]), weights[stop : stop + outputs]))
        start = stop + outputs
    return found


def _forward(plan: PlanManifest, x: tf.Tensor, weights: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
    """What goes into every layer, [rows, inputs] each, and the scores [rows]."""
    layers = _layers(plan, weights)
    inputs = [x]
    for matrix, biases in layers[:-1]:
        inputs.append(_activation(plan)(tf.linalg.matmul(inputs[-1], matrix) + biases))
    matrix, biases = layers[-1]
    return inputs, tf.linalg.matvec(inputs[-1], matrix[:, 0]) + biases[0]


def _backward(plan: PlanManifest, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """For every layer what went into it, [rows, inputs], and the derivative of each row's loss by what came out before
    the activation, [rows, outputs] (back-propagation)."""
    inputs, scores = _forward(plan, x, weights)
    layers = _layers(plan, weights)
    errors = (tf.math.sigmoid(scores) - y)[:, tf.newaxis]
    found = [(inputs[-1], errors)]
    for number in range(len(layers) - 2, -1, -1):
        out = inputs[number + 1]
        slope = 1.0 - out * out if _is_tanh(plan) else tf.cast(out > 0, tf.float32)
        errors = tf.linalg.matmul(errors, layers[number + 1][0], transpose_b=True) * slope
        found.insert(0, (inputs[number], errors))
    return found


def _is_tanh(plan: PlanManifest) -> bool:
    return isinstance(plan.model, MlpModel) and plan.model.activation == "tanh"


def _activation(plan: PlanManifest) -> Any:
    return tf.math.tanh if _is_tanh(plan) else tf.nn.relu
