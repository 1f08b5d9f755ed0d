"""Flower's SecAgg+: its own deployment, and its protocol alone."""
