"""Benchmarks of other projects' secure sums, each installed in its own environment."""
