"""Standardisation by a hospital's own training rows, for plans that declare it."""

from dataclasses import replace

import numpy as np

from services.hospital_node.sources.dataset import Dataset, SplitName


def standardised(dataset: Dataset) -> Dataset:
    """The data set with every coordinate centred and scaled by mean and standard deviation of its training rows.

    A coordinate that is constant in training is only centred. The constants are statistics of patients: they are used
    here, for all splits, and are kept nowhere else. Without training rows nothing changes.
    """
    train = dataset.x[dataset.split == SplitName.TRAIN].astype(np.float64)
    if len(train) == 0:
        return dataset
    # By the range: rounding may leave a constant a deviation of 1e-17, and another split's rows a value of 1e17.
    scale = np.where(np.ptp(train, axis=0) > 0, train.std(axis=0), 1.0)
    return replace(dataset, x=((dataset.x - train.mean(axis=0)) / scale).astype(np.float32))
