"""The secure sum's arithmetic alone, in this process, beside the memory bandwidth of the same bytes."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.bench.vectors import spare_bits, vector
from services.secure_sum import masks, public, secret
from services.secure_sum.derive import MaskPlan
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.encryption import Encryptor, PublicEncryptor
from services.secure_sum.wire import Layout

# Segments that are measured: enough for a stable median, few enough for large vectors.
_MOST_SEGMENTS: Final = 8
_REPEATS: Final = 5


@dataclass(frozen=True)
class Kernels:
    """Seconds for one segment.

    encrypt_s, mask_s, decrypt_s: what one hospital does: a ciphertext of zero, the values and all its masks on it, and
    the sum opened. check_s: an upload looked at by the aggregator. add_s: all uploads added, parsing and the expansion
    of seeds included. correct_s: the masks that are taken off, one stream an upload. bound_s: NumPy adding as many
    uint64 as the expanded uploads have.
    """

    encrypt_s: float
    mask_s: float
    check_s: float
    add_s: float
    correct_s: float
    bound_s: float
    decrypt_s: float

    @property
    def add_over_bandwidth_bound(self) -> float:
        return self.add_s / self.bound_s


def measure(layout: Layout, hospitals: int) -> Kernels:
    """Measure on the layout's first segments under a fresh key; medians."""
    key = secret.generate_group_key(layout.params)
    segments = min(layout.segments, _MOST_SEGMENTS)
    part = Layout(layout.params, sum(layout.values(segments - 1)), layout.lanes)
    encryptor = _encryptor(layout, key)
    spare = spare_bits(part.params, part.lanes)
    values = [vector(0, number, 1, part.vector_length, part.lanes, spare) for number in range(hospitals)]
    plans = [_plan(1) for _ in range(hospitals)]
    uploads = [_masked(part, list(encryptor.zeros(part)), each, plan) for each, plan in zip(values, plans, strict=True)]
    zeros, own_plan = list(encryptor.zeros(part)), _plan(hospitals)
    whole: MaskPlan = sum(plans, start=())

    def correct() -> list[Coefficients]:
        return [masks.of_segment(whole, part, index) for index in range(part.segments)]

    correction = correct()

    def add() -> list[bytes]:
        return [
            public.sum_segment(part, index, [upload[index] for upload in uploads], correction[index])
            for index in range(part.segments)
        ]

    def check() -> None:
        for index, segment in enumerate(uploads[0]):
            public.check_segment(part, index, segment)

    totals = add()
    if not np.array_equal(secret.decrypt_segments(totals, key, part), np.sum(values, axis=0)):
        raise AssertionError("the sum is not exact")

    per_segment = 1 / part.segments
    return Kernels(
        encrypt_s=_median(lambda: list(encryptor.zeros(part))) * per_segment,
        mask_s=_median(lambda: _masked(part, zeros, values[0], own_plan)) * per_segment,
        check_s=_median(check) * per_segment,
        add_s=_median(add) * per_segment,
        correct_s=_median(correct) * per_segment,
        bound_s=_bound(part, hospitals) * per_segment,
        decrypt_s=_median(lambda: secret.decrypt_segments(totals, key, part)) * per_segment,
    )


def _encryptor(layout: Layout, group_key: bytes) -> Encryptor:
    """What hospitals encrypt with under the layout's parameter set."""
    if layout.params.public_key:
        return PublicEncryptor(secret.make_public_key(group_key))
    return secret.SecretEncryptor(group_key)


def _plan(streams: int) -> MaskPlan:
    """As many mask streams as an upload has: one of the hospital's own, one with every other hospital."""
    return tuple((secrets.token_bytes(32), 1) for _ in range(streams))


def _masked(layout: Layout, zeros: list[bytes], values: Int64Vector, plan: MaskPlan) -> list[bytes]:
    made = []
    for index, segment in enumerate(zeros):
        start, count = layout.values(index)
        mask = masks.of_segment(plan, layout, index)
        made.append(public.add_masked(layout, index, segment, values[start : start + count], mask))
    return made


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
