"""A hospital's own model: the shared one, moved towards the hospital's data as far as its validation rows approve.

NumPy in float64: the model is small, the problem strongly convex, and nothing of it has to agree between hospitals.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.hospital_node.sources.dataset import Rows
from services.hospital_node.training.state import State, read_state
from services.plans.manifest import PlanManifest

Reals = NDArray[np.float64]

_MOST_STEPS: Final = 100
# Of the gradient's largest coordinate; the mean log loss is of the order of 1.
_TOLERANCE: Final = 1e-8
# Armijo (1966): a step must bring at least this share of what the slope promises.
_SUFFICIENT: Final = 1e-4
_SHORTEST: Final = 1e-10


def personalise(manifest: PlanManifest, state: bytes, train: Rows, validation: Rows) -> bytes:
    """The best of the shared model and its personal versions, one for each of the plan's proximal weights, as a state.

    A personal version w minimises the mean log loss on the training rows plus weight / 2 * |w - shared|^2 (Li et al.
    2021, Ditto), the intercept included. The best one has the lowest mean log loss on the validation rows among those
    whose accuracy there is not below the shared model's. Without validation rows, and where no version has a lower loss
    than the shared model, it is the shared model: the same bytes.

    Raises: FedmeshError(INVALID_ARGUMENT) when it is not a state of the plan.
    """
    shared = read_state(state, manifest)
    if manifest.personalisation is None or len(validation.y) == 0 or len(train.y) == 0:
        return state
    x, y = _with_intercept(train), _signs(train)
    validation_x, validation_y = _with_intercept(validation), _signs(validation)
    centre = shared.average.astype(np.float64)
    best, best_loss = state, _loss(validation_x, validation_y, centre)
    least_accuracy = _accuracy(validation_x, validation_y, centre)
    weights = centre
    # From the strongest pull to the weakest: each solution is a good start for the next one.
    for proximal in sorted(manifest.personalisation.proximal_weights, reverse=True):
        weights = nearest(x, y, centre, proximal, weights)
        # Judged as it is kept.
        kept = weights.astype(np.float32)
        judged = kept.astype(np.float64)
        loss = _loss(validation_x, validation_y, judged)
        if loss < best_loss and _accuracy(validation_x, validation_y, judged) >= least_accuracy:
            best, best_loss = State(shared.updates, kept, np.zeros_like(kept), kept).to_bytes(), loss
    return best


def nearest(x: Reals, signs: Reals, centre: Reals, proximal: float, start: Reals) -> Reals:
    """The minimiser of mean log(1 + exp(-sign x w)) + proximal / 2 * |w - centre|^2, by Newton's method: [d].

    x: [n, d], the intercept's ones included; signs: -1 or 1, [n]; proximal > 0. A Hessian costs n * d^2 operations.
    """

    def objective(weights: Reals) -> float:
        away = weights - centre
        return _loss(x, signs, weights) + proximal / 2 * float(away @ away)

    weights, value = start, objective(start)
    for _ in range(_MOST_STEPS):
        wrong = 0.5 * (1.0 - np.tanh(0.5 * signs * (x @ weights)))
        gradient = x.T @ (-signs * wrong) / len(signs) + proximal * (weights - centre)
        if np.abs(gradient).max() < _TOLERANCE:
            break
        curvature = wrong * (1.0 - wrong) / len(signs)
        step = np.linalg.solve((x * curvature[:, np.newaxis]).T @ x + proximal * np.eye(len(centre)), gradient)
        length = 1.0
        while length > _SHORTEST:
            moved = weights - length * step
            reached = objective(moved)
            if reached <= value - _SUFFICIENT * length * float(gradient @ step):
                weights, value = moved, reached
                break
            length /= 2
        else:
            # Rounding hides any further descent.
            break
    return weights


def _with_intercept(rows: Rows) -> Reals:
    return np.concatenate([rows.x, np.ones((len(rows.y), 1))], axis=1).astype(np.float64)


def _signs(rows: Rows) -> Reals:
    return np.where(rows.y > 0.5, 1.0, -1.0)


def _loss(x: Reals, signs: Reals, weights: Reals) -> float:
    return float(np.logaddexp(0.0, -signs * (x @ weights)).mean())


def _accuracy(x: Reals, signs: Reals, weights: Reals) -> float:
    """Share of rows on the right side of a probability of 0.5; a probability of exactly 0.5 says 0."""
    return float(((x @ weights > 0) == (signs > 0)).mean())
