"""Runs inside Flower's environment: one secure sum with its SecAgg+ workflow."""
