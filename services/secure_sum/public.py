"""Masking and adding uploads without any key, segment by segment.

`check_segment` and `sum_segment` work on bytes that nobody vouches for and are module-level functions of bytes, so that
they can run in a disposable process (`services.secure_sum.disposable`): the aggregator calls them there, not in the
process that serves requests. Hospitals use `add_masked` on their own bytes, and repeat `sum_segment` to check a sum.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from services.common.errors import Code, FedmeshError
from services.secure_sum import encoding, ring, uniform, wire
from services.secure_sum.encoding import Coefficients, Int64Vector
from services.secure_sum.wire import Layout


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


def sum_segment(layout: Layout, index: int, uploads: Iterable[bytes], correction: Coefficients) -> bytes:
    """Add the segments of uploads and subtract plaintext coefficients, uint64[count] below t; a segment of the sum.

    The uploads are taken one after the other and none is kept, so that a generator of them needs memory for one. The
    result does not depend on their order. For its noise see `ParameterSet`.

    Raises:
        FedmeshError: CIPHERTEXT_INVALID if an upload's segment is none, naming its position as `position`;
            INVALID_ARGUMENT for no uploads or more than the parameter set allows, or a correction that does not fit.
    """
    params = layout.params
    _require_plain(layout, index, correction)
    c0, c1 = _totals(layout, index, uploads)
    packed = wire.pack(ring.reduce(c1, params))
    del c1
    c0 = ring.subtract(ring.reduce(c0, params), ring.scale(correction, params), params)
    return wire.join(c0, packed)


def _totals(layout: Layout, index: int, uploads: Iterable[bytes]) -> tuple[Coefficients, Coefficients]:
    """The sums of c0, uint64[count], and of c1, uint64[ciphertexts * N]; neither is reduced."""
    params = layout.params
    most = min(params.max_contributions, ring.lazy_terms(params))
    c0 = np.zeros(layout.coefficients(index)[1], dtype=np.uint64)
    c1 = np.zeros((layout.ciphertexts_of(index), params.poly_modulus_degree), dtype=np.uint64)
    count = 0
    for count, upload in enumerate(uploads, 1):
        if count > most:
            break
        with _named(count - 1):
            _add_upload(layout, index, upload, c0, c1)
    if not 1 <= count <= most:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"a sum under {params.name} holds 1 to {most} uploads, not {'more' if count else 'none'}",
        )
    return c0, c1.reshape(-1)


def _add_upload(layout: Layout, index: int, upload: bytes, c0: Coefficients, c1: Coefficients) -> None:
    """Add the segment of one upload to the sums, without reducing them."""
    if layout.params.public_key:
        # Nothing of it is expanded: it has the form of a sum's segment.
        own, whole = wire.split_sum(layout, index, upload)
        c1 += whole
    else:
        own, seeds = wire.split_upload(layout, index, upload)
        for row, seed in zip(c1, seeds, strict=True):
            row += uniform.expand(seed.tobytes(), layout.params)
    c0 += own


@contextmanager
def _named(position: int) -> Iterator[None]:
    """Say in an error which upload it is about."""
    try:
        yield
    except FedmeshError as error:
        raise FedmeshError(error.code, error.message, **error.detail, position=position) from error


def _require_plain(layout: Layout, index: int, plain: Coefficients) -> None:
    count = layout.coefficients(index)[1]
    if plain.shape != (count,) or plain.dtype != np.uint64 or plain.max() >= layout.params.plain_modulus:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"segment {index} takes {count} plaintext coefficients of {layout.params.plain_modulus_bits} bits",
        )
