"""Scores of a model in NumPy: what a hospital predicts with, without TensorFlow. See `networks` for the graphs."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from services.plans.manifest import PlanManifest
from services.plans.models import MlpModel


@dataclass(frozen=True)
class Layer:
    """One fully connected layer: matrix [inputs, outputs], biases [outputs], and what is applied to what comes out.

    The last layer has one output, the log-odds of the outcome: nothing is applied to it.
    """

    matrix: NDArray[np.floating[Any]]
    biases: NDArray[np.floating[Any]]
    activation: Literal["relu", "tanh", "none"]


def layers(plan: PlanManifest, weights: NDArray[np.floating[Any]]) -> list[Layer]:
    """The layers of weights in the layout of `plans.models.Network`, the features' first; views, of the same type."""
    model, found, start = plan.network, [], 0
    sizes = model.layers(len(plan.feature_names))
    hidden = model.activation if isinstance(model, MlpModel) else "none"
    for number, (inputs, outputs) in enumerate(sizes):
        stop = start + inputs * outputs
        matrix = weights[start:stop].reshape(inputs, outputs)
        last = number == len(sizes) - 1
        found.append(Layer(matrix, weights[stop : stop + outputs], "none" if last else hidden))
        start = stop + outputs
    return found


def log_odds(plan: PlanManifest, weights: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of rows x [rows, features] by weights in the layout of `plans.models.Network`: float64 [rows]."""
    values = x
    for layer in layers(plan, weights):
        values = values @ layer.matrix + layer.biases
        if layer.activation != "none":
            values = np.tanh(values) if layer.activation == "tanh" else np.maximum(values, 0.0)
    return values[:, 0]
