"""A served model in forms that other programs read: NumPy, Keras and TensorFlow's SavedModel. See `export_onnx`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.scoring import layers
from services.hospital_node.training.state import read_state
from services.plans.manifest import PlanManifest
from services.plans.models import MlpModel

NUMPY_FILE = "model.npz"


def export_numpy(manifest: PlanManifest, state: bytes, folder: Path) -> Path:
    """Write `model.npz`: features (names), in the plan's order, and the parameters, float32.

    A logistic model has weights [features] and intercept []; the probability of the outcome is
    1 / (1 + exp(-(x @ weights + intercept))), x in the coordinates of the plan's schema. A perceptron has matrix_1
    [features, units], biases_1 [units], and so on, and `activation`, which is applied after each layer but the last.

    Raises: FedmeshError(INVALID_ARGUMENT) when it is no state of this plan, or the file cannot be written.
    """
    average = read_state(state, manifest).average
    arrays: dict[str, Any] = {"features": np.array(manifest.feature_names)}
    if isinstance(manifest.network, MlpModel):
        for number, layer in enumerate(layers(manifest, average), start=1):
            arrays |= {f"matrix_{number}": layer.matrix, f"biases_{number}": layer.biases}
        arrays["activation"] = np.array(manifest.network.activation)
    else:
        arrays |= {"weights": average[:-1], "intercept": average[-1]}
    path = folder / NUMPY_FILE
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error
    return path


def export_keras(manifest: PlanManifest, state: bytes, folder: Path) -> tuple[Path, Path]:
    """Write `model.keras` and the folder `saved_model`. Imports TensorFlow, which takes some seconds.

    Raises: FedmeshError(INVALID_ARGUMENT) when it is no state of this plan.
    """
    average = read_state(state, manifest).average
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    inputs = tf.keras.Input((len(manifest.feature_names),), name="features")
    *hidden, last = layers(manifest, average)
    parts = [tf.keras.layers.Dense(len(one.biases), activation=one.activation) for one in hidden]
    parts.append(tf.keras.layers.Dense(1, activation="sigmoid", name="probability"))
    values = inputs
    for part in parts:
        values = part(values)
    model = tf.keras.Model(inputs, values, name=manifest.name.replace("-", "_"))
    for part, layer in zip(parts, [*hidden, last], strict=True):
        part.set_weights([layer.matrix, layer.biases])
    keras, saved = folder / "model.keras", folder / "saved_model"
    model.save(keras)
    model.export(saved)
    return keras, saved


def export_names(manifest: PlanManifest, folder: Path) -> None:
    """Write `features.json`: the names of the input's coordinates, in order."""
    (folder / "features.json").write_text(json.dumps(list(manifest.feature_names), indent=2) + "\n", encoding="utf-8")
