"""Masking and adding uploads without any key, segment by segment.

`check_segment` and `sum_segment` work on bytes that nobody vouches for and are module-level functions of bytes, so that
they can run in a disposable process (`services.secure_sum.disposable`): the aggregator calls them there, not in the
process that serves requests. Hospitals use `add_masked` on their own bytes, and repeat `sum_segment` to check a sum.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, ring, uniform, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.wire import Bytes, Layout


def check_segment(layout: Layout, index: int, segment: bytes) -> None:
    """Check that bytes are exactly one segment of an upload: its length, and every coefficient below q.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if they are not; INVALID_ARGUMENT if there is no such segment.
    """
    wire.split_upload(layout, index, segment)


def add_mask(layout: Layout, index: int, segment: bytes, mask: Coefficients) -> bytes:
    """Add plaintext coefficients, uint64[count] below t, to the segment of an upload: c0 += round(q * mask / t).

    Hospitals use `add_masked`: a mask that is added to a ciphertext of values hides them from holders of the group key
    only up to how the two scaled parts were rounded.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if the segment is none; INVALID_ARGUMENT if the mask does not fit it.
    """
    c0, rest = wire.split_upload(layout, index, segment)
    _require_plain(layout, index, mask)
    c0 += ring.scale(mask, layout.params)
    return wire.join(ring.reduce(c0, layout.params), rest)


def add_masked(layout: Layout, index: int, zeros: bytes, values: Int64Vector, mask: Coefficients) -> bytes:
    """Turn a segment of an `encryption.Encryptor` into the upload's: c0 += round(q * ((m + mask) mod t) / t).

    `values`, int64[n], are those of this segment, m their coefficients. Values and mask are added before they are
    scaled, so that the result is distributed as a fresh ciphertext of a uniform plaintext: a holder of the group key
    learns m + mask and noise that depends on nothing. Scaled one by one, the two are rounded one by one, and the noise
    tells q * m / t mod 1 (N = 4096 coefficients are enough to tell two vectors apart with certainty).

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if the segment is none; INVALID_ARGUMENT if values or mask do not fit it.
    """
    params = layout.params
    count = layout.coefficients(index)[1]
    if values.shape != (layout.values(index)[1],):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"segment {index} takes {layout.values(index)[1]} values")
    _require_plain(layout, index, mask)
    plain = encoding.encode(values, params, layout.lanes).reshape(-1)[:count]
    plain += mask
    plain &= np.uint64(params.plain_modulus - 1)
    return add_mask(layout, index, zeros, plain)


def sum_segment(layout: Layout, index: int, uploads: Sequence[bytes], correction: Coefficients) -> bytes:
    """Add the segments of uploads and subtract plaintext coefficients, uint64[count] below t; a segment of the sum.

    The result does not depend on the order of the uploads. For its noise see `ParameterSet`.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if an upload's segment is none, naming its position as `position`;
            INVALID_ARGUMENT for no uploads or more than the parameter set allows, or a correction that does not fit.
    """
    params = layout.params
    _require_plain(layout, index, correction)
    most = min(params.max_contributions, ring.lazy_terms(params))
    if not 1 <= len(uploads) <= most:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"a sum under {params.name} holds 1 to {most} uploads, not {len(uploads)}"
        )
    c0, c1 = (_sum_whole if params.public_key else _sum_seeded)(layout, index, uploads)
    c0 = ring.subtract(ring.reduce(c0, params), ring.scale(correction, params), params)
    return wire.join(c0, wire.pack(c1))


def _sum_seeded(layout: Layout, index: int, uploads: Sequence[bytes]) -> tuple[Coefficients, Coefficients]:
    """The sums of c0, not reduced, and of the expanded c1, reduced."""
    total = np.zeros(layout.coefficients(index)[1], dtype=np.uint64)
    seeds: list[Bytes] = []
    for position, upload in enumerate(uploads):
        with _named(position):
            c0, seed = wire.split_upload(layout, index, upload)
        total += c0
        seeds.append(seed)
    return total, _sum_expanded(layout, np.stack(seeds, axis=1))


def _sum_whole(layout: Layout, index: int, uploads: Sequence[bytes]) -> tuple[Coefficients, Coefficients]:
    """As `_sum_seeded`, of uploads that have c1 in full: their segments have the form of a sum's."""
    total = np.zeros(layout.coefficients(index)[1], dtype=np.uint64)
    rest = np.zeros((layout.ciphertexts_of(index), layout.params.poly_modulus_degree), dtype=np.uint64)
    for position, upload in enumerate(uploads):
        with _named(position):
            c0, c1 = wire.split_sum(layout, index, upload)
        total += c0
        rest += c1
    return total, ring.reduce(rest.reshape(-1), layout.params)


@contextmanager
def _named(position: int) -> Iterator[None]:
    """Say in an error which upload it is about."""
    try:
        yield
    except FedmeshError as error:
        raise FedmeshError(error.code, error.message, **error.detail, position=position) from error


def _sum_expanded(layout: Layout, seeds: Bytes) -> Coefficients:
    """The sum of the c1 that uint8[ciphertexts, uploads, 32] expand to, uint64[ciphertexts * N]."""
    params = layout.params
    total = np.empty((len(seeds), params.poly_modulus_degree), dtype=np.uint64)
    for row, of_one in zip(total, seeds, strict=True):
        row[:] = uniform.expand(of_one[0].tobytes(), params)
        for seed in of_one[1:]:
            row += uniform.expand(seed.tobytes(), params)
    return ring.reduce(total.reshape(-1), params)


def _require_plain(layout: Layout, index: int, plain: Coefficients) -> None:
    count = layout.coefficients(index)[1]
    if plain.shape != (count,) or plain.dtype != np.uint64 or plain.max() >= layout.params.plain_modulus:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"segment {index} takes {count} plaintext coefficients of {layout.params.plain_modulus_bits} bits",
        )
