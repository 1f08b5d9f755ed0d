"""A served model in forms that other programs read: NumPy, Keras and TensorFlow's SavedModel."""

import json
import os
from pathlib import Path

import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.state import read_state
from services.plans.manifest import PlanManifest

NUMPY_FILE = "model.npz"


def export_numpy(manifest: PlanManifest, state: bytes, folder: Path) -> Path:
    """Write `model.npz`: weights float32 [features], intercept float32 [], features (names), in the plan's order.

    Probability of the outcome: 1 / (1 + exp(-(x @ weights + intercept))), x in the coordinates of the plan's schema.

    Raises: FedmeshError(INVALID_ARGUMENT) when it is no state of this plan, or the file cannot be written.
    """
    average = read_state(state, manifest).average
    path = folder / NUMPY_FILE
    try:
        np.savez(path, weights=average[:-1], intercept=average[-1], features=np.array(manifest.feature_names))
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
    layer = tf.keras.layers.Dense(1, activation="sigmoid", name="probability")
    model = tf.keras.Model(inputs, layer(inputs), name=manifest.name.replace("-", "_"))
    layer.set_weights([average[:-1, np.newaxis], average[-1:]])
    keras, saved = folder / "model.keras", folder / "saved_model"
    model.save(keras)
    model.export(saved)
    return keras, saved


def export_names(manifest: PlanManifest, folder: Path) -> None:
    """Write `features.json`: the names of the input's coordinates, in order."""
    (folder / "features.json").write_text(json.dumps(list(manifest.feature_names), indent=2) + "\n", encoding="utf-8")
