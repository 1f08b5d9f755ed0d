"""A plan family as a hospital's admin would install it: logistic regression that counts positive outcomes more.

The folder beside it is what an installer leaves: it names this module in the group `fedmesh.plan_families`.
"""

from collections.abc import Mapping
from typing import Any

Parameters = Mapping[str, float | bool | str]


def check(parameters: Parameters, features: int, weights: int, length: int) -> None:
    if set(parameters) != {"positive_weight", "learning_rate"}:
        raise ValueError(f"parameters are positive_weight and learning_rate, not {', '.join(parameters) or 'none'}")
    if weights != features + 1 or length != weights:
        raise ValueError(f"it trains logistic models with length = {features + 1}, not {length} for {weights} weights")
    if any(isinstance(value, str | bool) or value <= 0 for value in parameters.values()):
        raise ValueError("positive_weight and learning_rate must be numbers above 0")


def vector(x: Any, y: Any, weights: Any, parameters: Parameters) -> Any:
    # The node checks plans without TensorFlow; only the compile process calls this.
    import tensorflow as tf

    features = tf.concat([x, [1.0]], axis=0)
    residual = tf.math.sigmoid(tf.reduce_sum(features * weights)) - y
    return residual * (1.0 + y * (float(parameters["positive_weight"]) - 1.0)) * features


def update(weights: Any, velocity: Any, mean: Any, parameters: Parameters) -> tuple[Any, Any]:
    return weights - float(parameters["learning_rate"]) * mean, velocity
