"""Prints CPU seconds and bytes of the secure sum's steps, against numpy adding the same ciphertexts.

Usage: python scripts/measure_secure_sum.py [VALUES] [HOSPITALS]
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from services.secure_sum import masks, public, secret
from services.secure_sum.encoding import Coefficients
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.wire import Layout, layout_of, split_upload


def timed(work: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    started = time.process_time()
    result = work(*args)
    return time.process_time() - started, result


def main(length: int, hospitals: int) -> None:
    layout = layout_of(DEFAULT.name, length, 2)
    indices = range(layout.segments)
    key, rng = secret.generate_group_key(), np.random.default_rng(1)
    vectors = [rng.integers(-1000, 1000, length) for _ in range(hospitals)]
    plans = [((rng.bytes(32), 1),) for _ in range(hospitals)]

    def print_row(step: str, seconds: float, note: str = "") -> None:
        print(f"{step:44s}{seconds * 1000:9.1f} ms  {note}")

    print(f"{length} values, {hospitals} hospitals, {layout.segments} segments; CPU time a hospital or a sum")
    print(f"bytes a value: {layout.upload_bytes / length:.2f} up, {layout.sum_bytes / length:.2f} down")
    uploads = []
    for vector, plan in zip(vectors, plans, strict=True):
        encrypting, segments = timed(lambda values: list(secret.encrypt_segments(values, key, layout)), vector)
        expanding, mask = timed(lambda keys: [masks.coefficients(keys, *layout.coefficients(i)) for i in indices], plan)
        masking, masked = timed(lambda a, b: [public.add_mask(layout, i, a[i], b[i]) for i in indices], segments, mask)
        uploads.append(masked)
    print_row("encrypt", encrypting)
    print_row("expand one mask stream", expanding)
    print_row("add a mask", masking)
    checking, _ = timed(lambda: [_check(layout, i, upload[i]) for upload in uploads for i in indices])
    print_row("check an upload", checking / hospitals)
    whole = sum(plans, start=())
    correction = [masks.coefficients(whole, *layout.coefficients(i)) for i in indices]
    adding, total = timed(
        lambda: [public.sum_segment(layout, i, [upload[i] for upload in uploads], correction[i]) for i in indices]
    )
    size = layout.ciphertexts * DEFAULT.poly_modulus_degree * 2
    ciphertexts = rng.integers(0, DEFAULT.coeff_modulus, (hospitals, size), dtype=np.uint64)
    accumulator = np.zeros(size, dtype=np.uint64)
    bound, _ = timed(lambda: [np.add(accumulator, each, out=accumulator) for each in ciphertexts])
    print_row("numpy adds an expanded ciphertext", bound / hospitals)
    print_row("add an upload, decoding included", adding / hospitals, f"{adding / bound:.0f} times numpy")
    c0_only, _ = timed(lambda: [_add_c0(layout, i, [upload[i] for upload in uploads]) for i in indices])
    print_row("  of which c0", c0_only / hospitals, f"{c0_only / bound * 2:.0f} times numpy on c0 alone")
    decrypting, plain = timed(lambda: secret.decrypt_segments(total, key, layout))
    print_row("decrypt the sum", decrypting)
    assert np.array_equal(plain, np.sum(vectors, axis=0))


def _check(layout: Layout, index: int, segment: bytes) -> bool:
    public.check_segment(layout, index, segment)
    return True


def _add_c0(layout: Layout, index: int, uploads: list[bytes]) -> Coefficients:
    total = np.zeros(layout.coefficients(index)[1], dtype=np.uint64)
    for upload in uploads:
        total += split_upload(layout, index, upload)[0]
    return total


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given + [1_000_000, 15][len(given) :]))
