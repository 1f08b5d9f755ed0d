"""Standardisation by a hospital's own training rows."""

import numpy as np

from services.hospital_node.sources.dataset import SplitName
from services.hospital_node.sources.standardise import standardised
from tests.support.tiny_plan import FEDAVG, dataset, manifest

PLAN = manifest(FEDAVG)


def test_constants_come_from_training_rows_only() -> None:
    given = dataset(PLAN, seed=3)
    train = given.split == SplitName.TRAIN
    moved = standardised(given)
    np.testing.assert_allclose(moved.x[train].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(moved.x[train].std(axis=0), 1, atol=1e-6)
    others = given.x[~train].astype(np.float64)
    expected = (others - given.x[train].mean(axis=0)) / given.x[train].std(axis=0)
    np.testing.assert_allclose(moved.x[~train], expected, atol=1e-5)


def test_what_is_constant_in_training_is_only_centred() -> None:
    """0.1 has no exact mean in binary: the deviation of a constant would be tiny, and not zero."""
    rows = len(dataset(PLAN, seed=3).y)
    given = dataset(PLAN, seed=3, x=np.full((rows, len(PLAN.feature_names)), 0.1))
    given.x[given.split != SplitName.TRAIN] = 2.1
    moved = standardised(given)
    np.testing.assert_allclose(moved.x[given.split == SplitName.TRAIN], 0, atol=1e-6)
    np.testing.assert_allclose(moved.x[given.split != SplitName.TRAIN], 2, atol=1e-6)


def test_nothing_to_learn_from_changes_nothing() -> None:
    given = dataset(PLAN, seed=3)
    given.split[:] = SplitName.TEST
    assert standardised(given) is given
