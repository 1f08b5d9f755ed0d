"""Attempts, leases, task streams and presence in Redis, keyspace `coordinator:`."""
