"""The families: what each kind of algorithm computes. One file each; this is the registry.

Only the compile process imports this package: it loads TensorFlow. To add a kind: a class in
`services/plans/algorithms.py` (what a plan says), a `Family` in a file here, one line below. A hospital's admin adds
one without touching fedmesh: see `packages` and docs/learning.md.
"""

from collections.abc import Mapping
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.families.averaging import Adam, Averaging, Yogi
from services.hospital_node.training.families.base import Family
from services.hospital_node.training.families.descent import Descent
from services.hospital_node.training.families.installed import Installed
from services.hospital_node.training.families.ridge import OneShotRidge
from services.plans.algorithms import (
    AlgorithmKind,
    FedAdam,
    FedAvg,
    FedProx,
    FedYogi,
    GradientDescent,
    InstalledFamily,
    Ridge,
)
from services.plans.manifest import PlanManifest

FAMILIES: Final[Mapping[type[AlgorithmKind], type[Family]]] = {
    FedAvg: Averaging,
    FedProx: Averaging,
    FedAdam: Adam,
    FedYogi: Yogi,
    GradientDescent: Descent,
    Ridge: OneShotRidge,
    InstalledFamily: Installed,
}


def family_of(plan: PlanManifest) -> Family:
    """Raises: FedmeshError(PLAN_INVALID) for a kind that hospitals do not train by."""
    found = FAMILIES.get(type(plan.algorithm))
    if found is None:
        raise FedmeshError(Code.PLAN_INVALID, f"hospitals do not train by {plan.algorithm.kind!r}")
    return found(plan)
