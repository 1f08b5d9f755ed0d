"""Sums in Redis, keyspace `aggregator:`."""
