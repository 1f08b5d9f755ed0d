"""Sums the hospitals' ciphertexts of an attempt. Holds no key; what it stores can be rebuilt from re-sent bytes."""
