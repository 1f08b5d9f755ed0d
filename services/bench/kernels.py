"""The aggregator's arithmetic alone, in this process, beside the memory bandwidth of the same bytes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.bench.vectors import vector
from services.secure_sum import public, secret
from services.secure_sum.wire import Layout

# Segments that are measured: enough for a stable median, few enough for large vectors.
_MOST_SEGMENTS: Final = 8
_REPEATS: Final = 5


@dataclass(frozen=True)
class Kernels:
    """Seconds for one segment. bound_s: NumPy adding as many uint64 as `uploads` expanded segments have, one by one.

    add_s: adding them as the aggregator does, parsing and the expansion of seeds included. encrypt_s, decrypt_s: one
    hospital's segment.
    """

    bound_s: float
    add_s: float
    encrypt_s: float
    decrypt_s: float

    @property
    def add_over_bandwidth_bound(self) -> float:
        return self.add_s / self.bound_s


def measure(layout: Layout, hospitals: int) -> Kernels:
    """Measure on the layout's first segments under a fresh key; medians."""
    key = secret.generate_group_key(layout.params)
    segments = min(layout.segments, _MOST_SEGMENTS)
    part = Layout(layout.params, sum(layout.values(segments - 1)), layout.lanes)
    values = [vector(0, number, 1, part.vector_length, part.lanes) for number in range(hospitals)]
    uploads = [list(secret.encrypt_segments(each, key, part)) for each in values]
    zero = [np.zeros(part.coefficients(index)[1], dtype=np.uint64) for index in range(part.segments)]

    def add() -> list[bytes]:
        return [public.sum_segment(part, i, [u[i] for u in uploads], zero[i]) for i in range(part.segments)]

    totals = add()
    if not np.array_equal(secret.decrypt_segments(totals, key, part), np.sum(values, axis=0)):
        raise AssertionError("the sum is not exact")

    per_segment = 1 / part.segments
    return Kernels(
        bound_s=_bound(part, hospitals) * per_segment,
        add_s=_median(add) * per_segment,
        encrypt_s=_median(lambda: list(secret.encrypt_segments(values[0], key, part))) * per_segment,
        decrypt_s=_median(lambda: secret.decrypt_segments(totals, key, part)) * per_segment,
    )


def _bound(layout: Layout, hospitals: int) -> float:
    words = 2 * layout.ciphertexts * layout.params.poly_modulus_degree
    operands = [np.arange(words, dtype=np.uint64) for _ in range(hospitals)]
    total = np.zeros(words, dtype=np.uint64)

    def add() -> None:
        for operand in operands:
            np.add(total, operand, out=total)

    return _median(add)


def _median(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))
