"""The registry: hospitals, plans, jobs, committed rounds, model versions and metrics."""
