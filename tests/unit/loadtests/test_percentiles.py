"""Percentiles of few runs are runs, by nearest rank."""

from loadtests.peers.percentiles import percentile, summary


def test_of_few_runs_the_median_is_the_middle_and_p99_the_largest() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0, "runs": 3}
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([5.0], 0.0) == 5.0
