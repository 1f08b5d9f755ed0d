"""What the measuring round adds to the secure sum for a plan's `checks`, and what follows from the opened sum.

A contribution is made of counts of encounters, each in one bin of a histogram of the score: for every subgroup over the
validation rows, and once over the training rows. From the sum follow the AUROC of every subgroup, and how well a
threshold on the loss tells training rows from validation rows: tensorflow_privacy's THRESHOLD_ATTACK (Yeom et al. 2018)
on the rows that the histograms tell of. Of released sums, all of it is post-processing.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.hospital_node.domain.attacks import ALL, THRESHOLD
from services.hospital_node.sources.dataset import Rows
from services.hospital_node.training.attack import Attacks, Scored
from services.hospital_node.training.metrics import auroc
from services.hospital_node.training.scoring import log_odds
from services.plans.checks import Checks
from services.plans.manifest import Metrics, PlanManifest
from services.transparency.findings import Finding

Counts = NDArray[np.float64]

FULL_LANE: Final = 0.5
"""A sum beyond half of its lane: that it did not wrap around can no longer be told."""

MOST_ROWS: Final = 1 << 18
"""Of one outcome, that an attack is given: a hospital that lies could otherwise claim more than memory holds."""


def measure(manifest: PlanManifest, weights: NDArray[np.float32], train: Rows, validation: Rows) -> NDArray[np.int64]:
    """The measuring round's coordinates behind the metrics part: int64 [groups_length + members_length].

    weights: those of the served model, intercept last. train, validation: as capped as the plan's sensitivities say;
    validation.groups: int64 [n, k], the group of each row in each subgroup column.
    """
    metrics = manifest.metrics
    assert metrics is not None, "the manifest demands metrics of plans with checks"
    parts = []
    scored = _bins(manifest, validation, weights)
    for column, groups in enumerate(_by_column(manifest)):
        assert validation.groups is not None, "the source reads what the plan's subgroups need"
        member = validation.groups[:, column]
        parts += [_histogram(metrics, scored[member == number]) for number in range(len(groups))]
    parts.append(_histogram(metrics, _bins(manifest, train, weights)))
    return np.concatenate(parts) * manifest.encoding.metrics_units


def find(
    manifest: PlanManifest, peaks: Mapping[int, float], measured: NDArray[np.int64], attacks: Attacks
) -> tuple[Finding, ...]:
    """The hospitals' checks.

    peaks: by round, the largest |coordinate| of the opened sum as a part of half a lane's range. measured: the sum of
    the measuring round behind the training part, int64 [vector_length - train_length].

    Raises: FedmeshError(INTERNAL) when the attack could not be made.
    """
    checks, metrics = manifest.checks, manifest.metrics
    assert checks is not None, "only plans with checks are measured for them"
    assert metrics is not None, "the manifest demands metrics of plans with checks"
    counts = np.maximum(measured.astype(np.float64) / manifest.encoding.metrics_units, 0.0)
    size = 2 * metrics.score_bins
    rest = counts[manifest.metrics_length :].reshape(-1, 2, metrics.score_bins)
    everybody, members = counts[:size].reshape(2, metrics.score_bins), rest[-1]
    groups = dict(zip(manifest.groups, rest[:-1], strict=True))
    return (
        _saturation(peaks),
        _membership(manifest, members, everybody, attacks),
        _subgroups(checks, groups, everybody),
    )


def rows_of(manifest: PlanManifest, counts: Counts) -> Scored:
    """A row for every unit of every bin, with the score in the bin's middle.

    counts: of encounters, float64 [2, bins], positives first. Noise leaves parts of encounters, but whole units. An
    outcome with more than `MOST_ROWS` units gets about that many rows, in the same proportions.
    """
    metrics = manifest.metrics
    assert metrics is not None, "the manifest demands metrics of plans with checks"
    units = counts * manifest.encoding.metrics_units
    whole = np.rint(units / np.maximum(units.sum(axis=1, keepdims=True) / MOST_ROWS, 1.0)).astype(np.int64)
    low, high = metrics.logit_range
    middle = low + (np.arange(metrics.score_bins) + 0.5) * (high - low) / metrics.score_bins
    return Scored(np.repeat(np.tile(middle, 2), whole.ravel()), np.repeat(np.array([1, 0]), whole.sum(axis=1)))


def _saturation(peaks: Mapping[int, float]) -> Finding:
    peak = max(peaks.values(), default=0.0)
    figures = {"peak": _rounded(peak), "rounds_seen": float(len(peaks))}
    if not peaks or peak >= FULL_LANE:
        return Finding("saturation", False, f"a sum filled {peak:.1%} of its lanes' range", figures)
    return Finding("saturation", True, f"sums filled at most {peak:.1%} of their lanes' range", figures)


def _membership(manifest: PlanManifest, members: Counts, others: Counts, attacks: Attacks) -> Finding:
    """The attack on the rows of each outcome; positives are the first row of both arguments."""
    checks = manifest.checks
    assert checks is not None, "only plans with checks are measured for them"
    enough = np.minimum(members.sum(axis=1), others.sum(axis=1)) >= checks.least_subgroup_count
    inside, outside = (rows_of(manifest, np.where(enough[:, np.newaxis], side, 0.0)) for side in (members, others))
    results = attacks.run((THRESHOLD,), inside, outside)
    found = {f"auc_{one.rows}": _rounded(one.auc) for one in results if one.rows != ALL}
    if not found:
        reason = (
            f"fewer than {checks.least_subgroup_count} training or validation rows of each outcome: too few to judge"
        )
        return Finding("membership-inference", False, reason, {})
    worst = max(found.values())
    passed = worst <= checks.largest_attack_auc
    relation = "at most" if passed else "above"
    return Finding(
        "membership-inference",
        passed,
        f"attack AUC {worst:.4f}, {relation} {checks.largest_attack_auc:g} (0.5 is guessing)",
        found,
    )


def _subgroups(checks: Checks, groups: Mapping[tuple[str, str], Counts], everybody: Counts) -> Finding:
    if not groups:
        return Finding("subgroups", False, "the plan names no subgroups", {})
    least = checks.least_subgroup_count
    judged = {name: counts for name, counts in groups.items() if counts.sum(axis=1).min() >= least}
    columns = {column for column, _ in groups} - {column for column, _ in judged}
    if columns or everybody.sum(axis=1).min() < least:
        where = ", ".join(sorted(columns)) or "all rows"
        return Finding("subgroups", False, f"too few positives or negatives to judge any group of {where}", {})
    overall = auroc(everybody[0], everybody[1])
    figures = {f"{column}={group}": _rounded(auroc(*counts)) for (column, group), counts in judged.items()}
    worst = min(figures, key=figures.__getitem__)
    gap = overall - figures[worst]
    passed = gap <= checks.largest_subgroup_gap
    reason = (
        f"AUROC of {worst} is {figures[worst]:.4f}, {gap:.4f} below the {overall:.4f} of all; at most"
        f" {checks.largest_subgroup_gap:g} is allowed; {len(judged)} of {len(groups)} groups are large enough to judge"
    )
    return Finding("subgroups", passed, reason, {**figures, "all": _rounded(overall)})


def _by_column(manifest: PlanManifest) -> list[list[str]]:
    columns: dict[str, list[str]] = {}
    for column, group in manifest.groups:
        columns.setdefault(column, []).append(group)
    return list(columns.values())


def _bins(manifest: PlanManifest, rows: Rows, weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each row among 2 * score_bins, positives first; -1 for a score that is not a number: int64 [n]."""
    metrics = manifest.metrics
    assert metrics is not None, "the manifest demands metrics of plans with checks"
    low, high = metrics.logit_range
    logits = log_odds(manifest, weights.astype(np.float64), rows.x.astype(np.float64))
    known = ~np.isnan(logits)
    position = np.zeros(len(logits))
    position[known] = np.clip(
        np.floor((logits[known] - low) / (high - low) * metrics.score_bins), 0, metrics.score_bins - 1
    )
    negative = (rows.y < 0.5).astype(np.int64)
    return np.where(known, negative * metrics.score_bins + position.astype(np.int64), -1)


def _histogram(metrics: Metrics, bins: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(bins[bins >= 0], minlength=2 * metrics.score_bins).astype(np.int64)


def _rounded(value: float) -> float:
    return round(float(value), 6)
