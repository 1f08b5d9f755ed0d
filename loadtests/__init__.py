"""Load tests and benchmarks; nothing here ships."""
