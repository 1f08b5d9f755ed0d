"""What a disposable process does for the aggregator: check a segment of an upload, add segments and take masks off."""

from collections.abc import Iterable

from services.secure_sum import masks, public
from services.secure_sum.derive import MaskPlan
from services.secure_sum.wire import Layout

MODULE = __name__
"""What a worker imports when it starts."""


def check(layout: Layout, index: int, segment: bytes) -> bytes:
    """Nothing, when the bytes are a segment of an upload.

    Raises: FedmeshError(CIPHERTEXT_INVALID).
    """
    public.check_segment(layout, index, segment)
    return b""


def add(layout: Layout, index: int, plan: MaskPlan, uploads: Iterable[bytes]) -> bytes:
    """A segment of the sum of uploads, of which it holds one at a time, without the masks of the plan.

    Raises: FedmeshError(CIPHERTEXT_INVALID).
    """
    return public.sum_segment(layout, index, uploads, masks.of_segment(plan, layout, index))
