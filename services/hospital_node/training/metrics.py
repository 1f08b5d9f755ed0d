"""Validation metrics from a secure sum of score histograms. All of it is post-processing of released numbers."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.plans.manifest import PlanManifest

# Integer units of a loss of `loss_clip`, in plans without privacy.
LOSS_UNITS: Final = 1 << 20
# Below this many positives or negatives (noise can leave any number) a curve means nothing.
_LEAST: Final = 1.0


def read_metrics(manifest: PlanManifest, total: NDArray[np.int64]) -> dict[str, float | None]:
    """loss, auroc, auprc, positives and negatives on the validation rows of all contributors.

    `total` is the whole summed vector, int64 [vector_length]. Noise can make counts negative: they count as zero.
    A metric without enough rows is None; so are all of them in a round that carries no metrics (an all-zero part).
    """
    metrics = manifest.metrics
    nothing: dict[str, float | None] = dict.fromkeys(("loss", "auroc", "auprc", "positives", "negatives"))
    if metrics is None or not np.any(total[manifest.train_length : manifest.train_length + manifest.metrics_length]):
        return nothing
    part = total[manifest.train_length : manifest.train_length + manifest.metrics_length].astype(np.float64)
    released = part[: 2 * metrics.score_bins].reshape(2, metrics.score_bins) / manifest.encoding.metrics_units
    positive, negative = np.maximum(released, 0.0)
    positives, negatives = float(positive.sum()), float(negative.sum())
    # The released counts are unbiased; clipped ones are not.
    rows = float(released.sum())
    if manifest.privacy is None:
        losses = float(part[-1]) / LOSS_UNITS * metrics.loss_clip
    else:
        losses = _histogram_loss(released, metrics.logit_range)
    enough = positives >= _LEAST and negatives >= _LEAST
    return {
        "loss": max(0.0, losses / rows) if rows >= _LEAST else None,
        "auroc": auroc(positive, negative) if enough else None,
        "auprc": _auprc(positive, negative) if enough else None,
        "positives": positives,
        "negatives": negatives,
    }


def _histogram_loss(released: NDArray[np.float64], logit_range: tuple[float, float]) -> float:
    """Sum of log losses, each score taken at the middle of its bin."""
    low, high = logit_range
    bins = released.shape[1]
    middle = low + (np.arange(bins) + 0.5) * (high - low) / bins
    return float(released[0] @ np.logaddexp(0.0, -middle) + released[1] @ np.logaddexp(0.0, middle))


def auroc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative; a shared bin counts half (Mann-Whitney)."""
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def _auprc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Average precision, one threshold a bin."""
    hits = np.cumsum(positive[::-1])
    flagged = hits + np.cumsum(negative[::-1])
    precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    return float((positive[::-1] * precision).sum() / positive.sum())
