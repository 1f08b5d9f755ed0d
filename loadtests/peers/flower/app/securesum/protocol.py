"""What server and clients agree on: the settings of SecAgg+ and the vectors that are summed."""

import numpy as np
from flwr.server.workflow import SecAggPlusWorkflow

CLIP = 1.0
QUANTISATION = 2**20  # steps over [-CLIP, CLIP]: the 20-bit clipped values that fedmesh sums
MODULUS = 2**32  # the workflow's default
WEIGHT = 1000.0  # the workflow's default; every client weighs as much, so no precision goes into weights

_SPREAD = np.uint32(2654435761)  # Knuth's multiplicative hash, so that neighbours differ


def vector(client: int, size: int) -> np.ndarray:
    """Client `client`'s float64[size] in [-CLIP, CLIP): cheap, and the same wherever it is computed."""
    hashed = (np.arange(size, dtype=np.uint32) + np.uint32(client * 7919)) * _SPREAD
    return (hashed >> np.uint32(8)).astype(np.float64) * (2 * CLIP / 2**24) - CLIP


def expected_sum(clients: int, size: int) -> np.ndarray:
    """float64[size], the sum over all clients."""
    total = np.zeros(size)
    for client in range(clients):
        total += vector(client, size)
    return total


def within_quantisation(total: np.ndarray, clients: int) -> bool:
    """Whether a sum is right: stochastic rounding moves each client's value by less than one step."""
    return bool(np.max(np.abs(total - expected_sum(clients, total.size))) <= clients * (2 * CLIP / QUANTISATION))


def workflow(clients: int, threshold: int, timeout_s: float) -> SecAggPlusWorkflow:
    """SecAgg+ on the complete graph: every client shares with all, `threshold` shares reconstruct."""
    return SecAggPlusWorkflow(
        num_shares=clients,
        reconstruction_threshold=threshold,
        max_weight=WEIGHT,
        clipping_range=CLIP,
        quantization_range=QUANTISATION,
        modulus_range=MODULUS,
        timeout=timeout_s,
    )
