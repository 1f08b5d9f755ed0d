"""A served model as ONNX, for the many programs that run it: a graph of Gemm, Tanh or Relu, and Sigmoid.

The package `onnx` is an extra: what a hospital trains and predicts with does not need it, and no conversion does.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.scoring import layers
from services.hospital_node.training.state import read_state
from services.plans.manifest import PlanManifest, plan_id

ONNX_FILE: Final = "model.onnx"
# Of 2021: what was released since reads them, and nothing here needs more.
_OPSET: Final = 13
_IR_VERSION: Final = 8
_OPERATORS: Final = {"relu": "Relu", "tanh": "Tanh"}


def require_onnx() -> None:
    """Raises: FedmeshError(NOT_FOUND) saying how to install the package `onnx` where it is missing."""
    if find_spec("onnx") is None:
        raise FedmeshError(
            Code.NOT_FOUND,
            "ONNX needs the package onnx, which is not installed: run `uv sync --extra onnx` in the repository, or "
            "`pip install 'onnx>=1.17,<1.19'` where fedmesh is installed",
        )


def export_onnx(manifest: PlanManifest, state: bytes, folder: Path) -> Path:
    """Write `model.onnx`: `features` float32 [rows, features] in the plan's order and its schema's coordinates,
    `probability` float32 [rows, 1]; `features` (JSON), `plan` and `plan_id` among its metadata.

    Raises: FedmeshError(NOT_FOUND) without the package `onnx`; INVALID_ARGUMENT when it is no state of this plan, or
        the file cannot be written.
    """
    require_onnx()
    import onnx

    model = _model(manifest, state)
    onnx.checker.check_model(model, full_check=True)
    path = folder / ONNX_FILE
    try:
        path.write_bytes(model.SerializeToString())
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error
    return path


def _model(manifest: PlanManifest, state: bytes) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, value = [], [], "features"
    for number, layer in enumerate(layers(manifest, read_state(state, manifest).average), start=1):
        names = [f"matrix_{number}", f"biases_{number}"]
        parameters = zip(names, (layer.matrix, layer.biases), strict=True)
        constants += [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in parameters]
        nodes.append(helper.make_node("Gemm", [value, *names], [f"sum_{number}"]))
        value = f"sum_{number}"
        if layer.activation != "none":
            nodes.append(helper.make_node(_OPERATORS[layer.activation], [value], [f"hidden_{number}"]))
            value = f"hidden_{number}"
    nodes.append(helper.make_node("Sigmoid", [value], ["probability"]))
    width = len(manifest.feature_names)
    graph = helper.make_graph(
        nodes,
        manifest.name.replace("-", "_"),
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows", 1])],
        constants,
    )
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, producer_name="fedmesh", opset_imports=[opset], ir_version=_IR_VERSION)
    helper.set_model_props(
        model,
        {"features": json.dumps(manifest.feature_names), "plan": manifest.name, "plan_id": plan_id(manifest)},
    )
    return model
