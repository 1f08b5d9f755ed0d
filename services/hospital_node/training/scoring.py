"""Scores of a model in NumPy: what a hospital predicts with, without TensorFlow. See `networks` for the graphs."""

import numpy as np
from numpy.typing import NDArray

from services.plans.manifest import PlanManifest
from services.plans.models import MlpModel


def log_odds(plan: PlanManifest, weights: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of rows x [rows, features] by weights in the layout of `plans.models.Network`: float64 [rows]."""
    model = plan.network
    layers = model.layers(len(plan.feature_names))
    values, start = x, 0
    for number, (inputs, outputs) in enumerate(layers):
        stop = start + inputs * outputs
        values = values @ weights[start:stop].reshape(inputs, outputs) + weights[stop : stop + outputs]
        start = stop + outputs
        if number < len(layers) - 1:
            values = np.tanh(values) if _is_tanh(model) else np.maximum(values, 0.0)
    return values[:, 0]


def _is_tanh(model: object) -> bool:
    return isinstance(model, MlpModel) and model.activation == "tanh"
