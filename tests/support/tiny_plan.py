"""A plan and data small enough to check by hand."""

import copy
import json
from typing import Any

import numpy as np

from services.common.errors import Code
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.plans.document import canonical_json, validate
from services.plans.manifest import PlanManifest, parse_manifest

SCHEMA: dict[str, Any] = {
    "name": "tiny",
    "patient_id": "patient",
    "encounter_id": "encounter",
    "label": {"name": "outcome", "positive": ["yes"], "negative": ["no"]},
    "exclude": [{"name": "left", "values": ["dead"]}],
    "missing_values": ["?"],
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "salt": "tiny"},
    "columns": [
        {"kind": "numeric", "name": "age", "minimum": 0, "maximum": 100, "centre": 50, "scale": 10},
        {
            "kind": "numeric",
            "name": "visits",
            "minimum": 0,
            "maximum": 9,
            "transform": "log1p",
            "missing": 0,
        },
        {
            "kind": "categorical",
            "name": "ward",
            "reference": "a",
            "others": "indicator",
            "levels": [
                {"name": "a", "values": ["A"]},
                {"name": "heart", "ranges": [[410, 430]], "centre": 0.25, "scale": 0.5},
            ],
        },
        {"kind": "flag", "name": "urgent", "true": ["Yes"], "false": ["No"], "centre": 0.5},
    ],
}
PRIVATE: dict[str, Any] = {
    "format": "fedmesh.plan/v1",
    "name": "tiny-private",
    "model": {"family": "logistic", "l2": 0.01, "initial_intercept": -1.0},
    "algorithm": {
        "kind": "gradient_descent",
        "learning_rate": 0.5,
        "momentum": 0.5,
        "expected_patients": 100,
        "patient_aggregation": "sum",
        "average_last": 2,
    },
    "privacy": {
        "unit": "patient",
        "epsilon": 0.5,
        "delta": 1e-6,
        "clip_norm": 1.0,
        "max_encounters_per_patient": 2,
        "extra_attempts": 1,
    },
    "rounds": {"count": 4},
    "encoding": {"scale": 4096, "metrics_units": 16},
    "metrics": {"every_rounds": 2, "score_bins": 8, "logit_range": [-3, 1], "epsilon": 0.5, "delta": 1e-6},
    "feature_schema": SCHEMA,
    "features": ["age", "visits", "ward", "urgent"],
}
FEDAVG: dict[str, Any] = {
    **PRIVATE,
    "name": "tiny-fedavg",
    "algorithm": {"kind": "fedavg", "local_steps": 3, "learning_rate": 0.5, "momentum": 0.5, "server_momentum": 0.25},
    "privacy": None,
    "encoding": {"scale": 1 << 24},
    "metrics": {"every_rounds": 1, "score_bins": 32},
    "personalisation": {"proximal_weights": [1, 0.1]},
}


def manifest(document: dict[str, Any]) -> PlanManifest:
    return validate(PlanManifest, document, "plan", Code.PLAN_INVALID)


def dataset(
    plan: PlanManifest, seed: int, patients: int = 40, size: float = 1.0, x: "np.ndarray[Any, Any] | None" = None
) -> Dataset:
    """Random rows: half of the patients train, the others validate; one to four encounters each."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    rows = len(owner)
    split = np.where(owner % 2 == 0, SplitName.TRAIN, SplitName.VALIDATION).astype(np.int8)
    drawn = rng.normal(0, size, (rows, len(plan.feature_names))) if x is None else x[:rows]
    return Dataset(
        feature_names=plan.feature_names,
        x=drawn.astype(np.float32),
        y=(rng.random(rows) < 0.3).astype(np.float32),
        patient=(owner // 2).astype(np.int64),
        split=split,
        encounter_ids=np.array([f"e{row}" for row in range(rows)], dtype=np.object_),
        patient_ids=np.array([f"p{number}" for number in owner], dtype=np.object_),
        content_sha256="0" * 64,
        rows_read=rows,
        rows_excluded=0,
        rows_elsewhere=0,
    )


def changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one field set (dots descend, digits index); `...` deletes it."""
    result: dict[str, Any] = copy.deepcopy(document)
    *parents, last = path.split(".")
    target: Any = result
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return result


def wire(document: dict[str, Any]) -> bytes:
    """Canonical bytes of a document that may be invalid."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def reparsed(plan: PlanManifest) -> PlanManifest:
    return parse_manifest(canonical_json(plan))
