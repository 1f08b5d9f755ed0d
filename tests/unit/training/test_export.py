"""Exported models, run by the programs that they are for, predict what the hospital predicts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from services.cli.pull import pull
from services.common.errors import Code, FedmeshError
from services.hospital_node.training.export import export_keras, export_numpy
from services.hospital_node.training.export_onnx import export_onnx
from services.hospital_node.training.state import State
from services.hospital_node.training.trainer import predict
from services.plans.manifest import PlanManifest, plan_id
from tests.support.family_plans import PLANS
from tests.support.tiny_plan import PRIVATE, manifest

MODELS = {
    "logistic": manifest(PRIVATE),
    "ridge": PLANS["ridge"],
    "tanh": PLANS["mlp-private"],
    "two-tanh": PLANS["fedadam"],
    "relu": PLANS["fedprox"],
}


def a_state(plan: PlanManifest) -> bytes:
    rng = np.random.default_rng(plan.weights_length)
    average = rng.normal(0, 1, plan.weights_length).astype(np.float32)
    second = average**2 if plan.algorithm.second_moment else None
    # What is served is the mean of the last iterates, which is not where training stands.
    return State(3, average + 1, np.zeros_like(average), average, second).to_bytes()


def rows(plan: PlanManifest) -> NDArray[np.float32]:
    return np.random.default_rng(5).normal(0, 1, (50, len(plan.feature_names))).astype(np.float32)


def run_onnx(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (probability,) = session.run(["probability"], {"features": x})
    found: NDArray[np.float32] = probability[:, 0]
    return found


def run_numpy(path: Path, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """By what the docstring of `export_numpy` says, and nothing else."""
    with np.load(path) as read:
        if "weights" in read:
            scores = x.astype(float) @ read["weights"] + read["intercept"]
        else:
            activation: Any = {"tanh": np.tanh, "relu": lambda values: np.maximum(values, 0)}[str(read["activation"])]
            values, last = x.astype(float), len([name for name in read if name.startswith("matrix_")])
            for number in range(1, last + 1):
                values = values @ read[f"matrix_{number}"] + read[f"biases_{number}"]
                values = activation(values) if number < last else values
            scores = values[:, 0]
    found: NDArray[np.float64] = 1 / (1 + np.exp(-scores))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_onnx_and_numpy_give_the_plans_probabilities(tmp_path: Path, name: str) -> None:
    plan = MODELS[name]
    x = rows(plan)
    expected = predict(plan, a_state(plan), x)
    assert expected.std() > 0.05
    np.testing.assert_allclose(run_onnx(export_onnx(plan, a_state(plan), tmp_path), x), expected, atol=1e-6)
    np.testing.assert_allclose(run_numpy(export_numpy(plan, a_state(plan), tmp_path), x), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_equals_keras_and_saved_model(tmp_path: Path, name: str) -> None:
    import tensorflow as tf

    plan = MODELS[name]
    x = rows(plan)
    keras, saved = export_keras(plan, a_state(plan), tmp_path)
    found = run_onnx(export_onnx(plan, a_state(plan), tmp_path), x)
    np.testing.assert_allclose(found, tf.keras.models.load_model(keras).predict(x, verbose=0)[:, 0], atol=1e-6)
    served = tf.saved_model.load(str(saved))
    np.testing.assert_allclose(found, served.serve(x).numpy()[:, 0], atol=1e-6)


def test_onnx_says_what_it_is(tmp_path: Path) -> None:
    plan = MODELS["tanh"]
    model = onnx.load(export_onnx(plan, a_state(plan), tmp_path))
    said = {item.key: item.value for item in model.metadata_props}
    assert json.loads(said["features"]) == list(plan.feature_names)
    assert (said["plan"], said["plan_id"]) == (plan.name, plan_id(plan))
    assert [node.op_type for node in model.graph.node] == ["Gemm", "Tanh", "Gemm", "Tanh", "Gemm", "Sigmoid"]


def test_what_is_no_state_of_the_plan_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError) as caught:
        export_onnx(MODELS["tanh"], a_state(MODELS["logistic"]), tmp_path)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert list(tmp_path.iterdir()) == []


def test_where_onnx_is_missing_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "services.hospital_node.training.export_onnx.find_spec",
        lambda name: None if name == "onnx" else found(name),
    )
    with pytest.raises(FedmeshError, match="uv sync --extra onnx") as caught:
        pull(tmp_path / "model", hospital="hospital-01", onnx=True, folder=tmp_path)
    assert caught.value.code is Code.NOT_FOUND
    assert not (tmp_path / "model").exists()
