"""The hospital's node: a client of the mesh that trains on local data and lets only noised, encrypted sums out."""
