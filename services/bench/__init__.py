"""Benchmarks of the running system on this machine. Figures are for ratios within one run: machines are shared."""
