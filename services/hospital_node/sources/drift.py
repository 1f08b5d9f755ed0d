"""How far a hospital's data lies from a reference: the population stability index, bin by bin, computed locally.

PSI = sum over bins of (p - q) ln(p / q), the symmetrised Kullback-Leibler divergence of two sets of shares, with the
usual reading: below 0.1 the same, 0.1 to 0.25 moved, above 0.25 shifted.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.facts import CohortFacts
from services.plans.document import Strict, read_file, validate_json
from services.plans.schema import FeatureSchema

MOVED: Final = 0.1
SHIFTED: Final = 0.25
# An empty bin would make the index infinite.
_LEAST_SHARE: Final = 1e-4


class Snapshot(Strict):
    """Exact counts of a cohort, as `--save` keeps them at the hospital: rows by feature and bin."""

    format: Literal["fedmesh.data-snapshot/v1"]
    feature_schema: str
    rows: int
    bins: dict[str, dict[str, int]]


def stability(before: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """PSI of two sets of counts or shares by bin; None when either is all zero."""
    totals = sum(before.values()), sum(now.values())
    if min(totals) <= 0:
        return None
    index = 0.0
    for name in before.keys() | now.keys():
        p = max(now.get(name, 0) / totals[1], _LEAST_SHARE)
        q = max(before.get(name, 0) / totals[0], _LEAST_SHARE)
        index += (p - q) * math.log(p / q)
    return index


def verdict(index: float) -> str:
    """The usual words for a PSI."""
    return "same" if index < MOVED else "moved" if index < SHIFTED else "shifted"


def counted_bins(facts: CohortFacts, schema: FeatureSchema) -> dict[str, dict[str, int]]:
    """Rows by feature, or label, and bin."""
    return {schema.label.name: facts.outcomes, **{column.name: column.bins for column in facts.columns}}


def drift(before: Mapping[str, Mapping[str, float]], now: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """PSI of every feature that both have."""
    found = {name: stability(before[name], now[name]) for name in now if name in before}
    return {name: index for name, index in found.items() if index is not None}


def save_snapshot(path: Path, facts: CohortFacts, schema: FeatureSchema) -> None:
    """Write a snapshot, mode 0600: its counts are exact. Raises: FedmeshError(INVALID_ARGUMENT)."""
    snapshot = Snapshot(
        format="fedmesh.data-snapshot/v1",
        feature_schema=schema.name,
        rows=facts.rows,
        bins=counted_bins(facts, schema),
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), 0o600)
            json.dump(snapshot.model_dump(mode="json"), stream, indent=1)
            stream.write("\n")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error


def load_snapshot(path: Path, schema: FeatureSchema) -> Snapshot:
    """Read what `save_snapshot` wrote. Raises: FedmeshError(INVALID_ARGUMENT), also for another schema's."""
    data = read_file(path, Code.INVALID_ARGUMENT)
    snapshot = validate_json(Snapshot, data, f"the snapshot {path.name}", Code.INVALID_ARGUMENT)
    if snapshot.feature_schema != schema.name:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"{path.name} is a snapshot of schema {snapshot.feature_schema!r}, the plan uses {schema.name!r}",
        )
    return snapshot
