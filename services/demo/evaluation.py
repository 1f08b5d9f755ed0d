"""Compares models on the common test set, from the local files: outside every privacy guarantee, never sent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from services.hospital_node.sources.dataset import Dataset, Rows, SplitName

_FLAGGED: Final = 0.10
_REGULARISATIONS: Final = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Accuracy:
    """Share of rows on the right side of a probability of 0.5: the mean of the hospitals' shares, and of all rows.

    personalised: as client_mean, each hospital with its own model; None where there is none.
    """

    client_mean: float
    pooled: float
    personalised: float | None = None


@dataclass(frozen=True)
class TestScores:
    """How a model does on the test set.

    auroc, auprc: areas under the ROC and precision-recall curves. brier: mean squared error of the probability.
    recall_at_10pct: share of the positive outcomes found among the 10 % of encounters with the highest scores.
    accuracy: only where it says anything.
    """

    __test__ = False  # not a test case, whatever its name

    auroc: float
    auprc: float
    brier: float
    recall_at_10pct: float
    n_encounters: int
    n_patients: int
    accuracy: Accuracy | None = None

    def as_dict(self) -> dict[str, float | int]:
        figures = {name: value for name, value in asdict(self).items() if name != "accuracy"}
        if self.accuracy is not None:
            figures |= {"accuracy_client_mean": self.accuracy.client_mean, "accuracy_pooled": self.accuracy.pooled}
            if self.accuracy.personalised is not None:
                figures["accuracy_client_mean_personalised"] = self.accuracy.personalised
        return figures


@dataclass(frozen=True)
class LocalOnly:
    """What each hospital reaches with its own data alone: plain mean, and mean weighted by training rows.

    accuracy_client_mean: each on its own test rows; None where accuracy says nothing.
    """

    auroc_mean: float
    auroc_weighted: float
    auprc_mean: float
    auprc_weighted: float
    accuracy_client_mean: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def accuracy(y: NDArray[np.float32], probability: NDArray[np.float64], owner: NDArray[np.int64]) -> Accuracy:
    """y: 0 or 1, [n]; probability: float64 [n] in [0, 1]; owner: which hospital each row is of, int64 [n]."""
    right = (probability > 0.5) == (y > 0.5)
    shares = [float(right[owner == hospital].mean()) for hospital in np.unique(owner)]
    return Accuracy(client_mean=float(np.mean(shares)), pooled=float(right.mean()))


def score(
    y: NDArray[np.float32],
    probability: NDArray[np.float64],
    patients: int,
    owner: NDArray[np.int64] | None = None,
) -> TestScores:
    """Score predictions. y: 0 or 1, [n]; probability: float64 [n] in [0, 1]; owner: as in `accuracy`, if that is asked
    for."""
    flagged = np.argsort(-probability, kind="stable")[: max(1, round(_FLAGGED * len(y)))]
    return TestScores(
        auroc=float(roc_auc_score(y, probability)),
        auprc=float(average_precision_score(y, probability)),
        brier=float(brier_score_loss(y, probability)),
        recall_at_10pct=float(y[flagged].sum() / y.sum()),
        n_encounters=len(y),
        n_patients=patients,
        accuracy=None if owner is None else accuracy(y, probability, owner),
    )


def with_personal(
    scores: TestScores, test: Rows, owner: NDArray[np.int64], probabilities: Sequence[NDArray[np.float64]]
) -> TestScores:
    """The scores with the accuracy of personal models, each on its own hospital's rows.

    probabilities: those of each hospital's own model for all test rows, in the order of `owner`'s numbers.
    """
    if scores.accuracy is None:
        return scores
    own = np.choose(owner, probabilities)
    personalised = accuracy(test.y, own, owner).client_mean
    return replace(scores, accuracy=replace(scores.accuracy, personalised=personalised))


def pooled_test(datasets: Sequence[Dataset]) -> Rows:
    """The test rows of all hospitals together; patients stay distinct."""
    return pooled(datasets, SplitName.TEST)


def pooled(datasets: Sequence[Dataset], split: SplitName) -> Rows:
    """The rows of one split of all hospitals together; patients stay distinct."""
    parts = [dataset.rows(split) for dataset in datasets]
    offsets = np.cumsum([0, *(part.patients for part in parts)])
    return Rows(
        x=np.concatenate([part.x for part in parts]),
        y=np.concatenate([part.y for part in parts]),
        patient=np.concatenate([part.patient + offset for part, offset in zip(parts, offsets, strict=False)]),
        patients=int(offsets[-1]),
        encounter_ids=np.concatenate([part.encounter_ids for part in parts]),
        patient_ids=np.concatenate([part.patient_ids for part in parts]),
    )


def owners_of_test(datasets: Sequence[Dataset]) -> NDArray[np.int64]:
    """Which of the hospitals each row of `pooled_test` is of."""
    return np.repeat(np.arange(len(datasets)), [int(np.sum(data.split == SplitName.TEST)) for data in datasets])


def local_only(datasets: Sequence[Dataset], test: Rows, owner: NDArray[np.int64] | None = None) -> LocalOnly:
    """Train a logistic regression at each hospital alone (no privacy, strength chosen on its validation rows).

    owner: which hospital each test row is of, if accuracy is asked for.
    """
    scores, weights = [], []
    own = np.zeros(len(test.y))
    for number, dataset in enumerate(datasets):
        train = dataset.rows(SplitName.TRAIN)
        probability = _alone(dataset, test.x)
        if owner is not None:
            own[owner == number] = probability[owner == number]
        scores.append(score(test.y, probability, test.patients))
        weights.append(len(train.y))
    auroc, auprc = [s.auroc for s in scores], [s.auprc for s in scores]
    return LocalOnly(
        auroc_mean=float(np.mean(auroc)),
        auroc_weighted=float(np.average(auroc, weights=weights)),
        auprc_mean=float(np.mean(auprc)),
        auprc_weighted=float(np.average(auprc, weights=weights)),
        accuracy_client_mean=None if owner is None else accuracy(test.y, own, owner).client_mean,
    )


def _alone(dataset: Dataset, x_test: NDArray[np.float32]) -> NDArray[np.float64]:
    train, validation = dataset.rows(SplitName.TRAIN), dataset.rows(SplitName.VALIDATION)
    if len(np.unique(train.y)) < 2:
        return np.full(len(x_test), float(train.y.mean()) if len(train.y) else 0.5)
    scaler = StandardScaler().fit(train.x)
    best: tuple[float, LogisticRegression] | None = None
    for strength in _REGULARISATIONS:
        model = LogisticRegression(C=strength, max_iter=300).fit(scaler.transform(train.x), train.y)
        if len(np.unique(validation.y)) < 2:
            return np.asarray(model.predict_proba(scaler.transform(x_test))[:, 1])
        auroc = roc_auc_score(validation.y, model.predict_proba(scaler.transform(validation.x))[:, 1])
        if best is None or auroc > best[0]:
            best = (float(auroc), model)
    assert best is not None
    return np.asarray(best[1].predict_proba(scaler.transform(x_test))[:, 1])
