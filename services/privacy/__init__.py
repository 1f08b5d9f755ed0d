"""Differential privacy: accounting, noise and budget. The unit is one patient at one hospital, add or remove.

`accounting` and `budget` import nothing heavy; the PLD accountant and the noise sampler load when first used.
"""
