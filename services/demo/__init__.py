"""The demonstration: a cohort, fifteen hospital processes, one job, and an honest comparison."""
