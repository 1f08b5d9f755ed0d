"""A tiny plan of every family, and where the example package of an installed family lies."""

from pathlib import Path
from typing import Any

from services.hospital_node.training.packages import GROUP
from services.plans.manifest import PlanManifest
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, manifest

# A folder as on a hospital's import path: a package and the .dist-info folder that its installer left.
INSTALLED = Path(__file__).parent / "installed"
assert GROUP in (INSTALLED / "fedmesh_example_family-1.0.dist-info" / "entry_points.txt").read_text()

_LOCAL = {"local_steps": 3, "learning_rate": 0.5, "momentum": 0.5}
_PLAIN = {key: value for key, value in FEDAVG.items() if key != "personalisation"}
_PATIENTS = {"expected_patients": 100, "patient_aggregation": "sum"}
_RIDGE = {
    **PRIVATE,
    "model": {"family": "logistic", "l2": 0.05, "initial_intercept": -1.0},
    "algorithm": {"kind": "ridge", "moment_weight": 3, **_PATIENTS},
    "rounds": {"count": 1},
    "metrics": None,
}


def _mlp(hidden: list[int], activation: str) -> dict[str, Any]:
    return {
        "family": "mlp",
        "hidden": hidden,
        "activation": activation,
        "l2": 0.01,
        "initial_intercept": -1.0,
        "seed": 7,
    }


DOCUMENTS: dict[str, dict[str, Any]] = {
    "fedprox-zero": {**_PLAIN, "algorithm": {**FEDAVG["algorithm"], "kind": "fedprox", "mu": 0}},
    "fedprox": {
        **_PLAIN,
        "model": _mlp([3], "relu"),
        "algorithm": {**_LOCAL, "kind": "fedprox", "mu": 2.0, "server_learning_rate": 0.5},
    },
    "fedadam": {
        **_PLAIN,
        "model": _mlp([8, 4], "tanh"),
        "algorithm": {**_LOCAL, "local_steps": 10, "kind": "fedadam", "server_learning_rate": 0.1, "tau": 0.01},
    },
    "fedyogi": {**_PLAIN, "algorithm": {**_LOCAL, "kind": "fedyogi", "server_learning_rate": 0.1, "beta2": 0.9}},
    "mlp-private": {**PRIVATE, "model": _mlp([4, 3], "tanh")},
    "ridge": {**_RIDGE, "privacy": None, "encoding": {"scale": 1 << 24}},
    "ridge-private": _RIDGE,
    "weighted-private": {
        **PRIVATE,
        "algorithm": {
            "kind": "installed",
            "family": "weighted-logistic",
            "length": 6,
            "parameters": {"positive_weight": 3.0, "learning_rate": 0.5},
            **_PATIENTS,
        },
    },
}
PLANS: dict[str, PlanManifest] = {name: manifest({**given, "name": name}) for name, given in DOCUMENTS.items()}
# Compiled with blocks of few patients.
BLOCKS = manifest(changed(PRIVATE, "name", "tiny-blocks"))
