"""The shared model, the hospitals' own, and each hospital alone, on the common test set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.demo.evaluation import (
    LocalOnly,
    TestScores,
    local_only,
    owners_of_test,
    pooled_test,
    score,
    with_personal,
)
from services.hospital_node.sources.dataset import Dataset, Rows
from services.plans.manifest import PlanManifest


@dataclass(frozen=True)
class Comparison:
    """test: the common rows; probability: the shared model's scores of them, float64 [n]. personal_models: hospitals
    whose own model differs from the shared one, None where the plan makes none."""

    test: Rows
    probability: NDArray[np.float64]
    scores: TestScores
    local_only: LocalOnly
    personal_models: int | None


def compare(
    plan: PlanManifest, sets: Sequence[Dataset], state: bytes, own: Sequence[bytes] | None, *, judged_by_accuracy: bool
) -> Comparison:
    """Judge the final state, and the hospitals' own models in the order of `sets` if there are any."""
    from services.hospital_node.training.trainer import predict

    test = pooled_test(sets)
    owner = owners_of_test(sets) if judged_by_accuracy else None
    probability = predict(plan, state, test.x)
    scores = score(test.y, probability, test.patients, owner)
    if own is not None and owner is not None:
        scores = with_personal(scores, test, owner, [predict(plan, model, test.x) for model in own])
    return Comparison(
        test=test,
        probability=probability,
        scores=scores,
        local_only=local_only(sets, test, owner),
        personal_models=None if own is None else sum(model != state for model in own),
    )
