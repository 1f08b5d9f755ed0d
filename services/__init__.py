"""fedmesh: federated learning for a hospital consortium."""
