"""NVFlare's homomorphic encryption."""
