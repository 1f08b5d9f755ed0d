"""What a sum is computed from, checked: who is in it, and what takes their masks off."""

import hashlib
from collections.abc import Sequence

from services.aggregator.domain.sums import Sum
from services.common.errors import Code, FedmeshError
from services.secure_sum.derive import MaskPlan
from services.secure_sum.opening import MaskKey, Opening, correction


def plan_of(held: Sum, survivors: Sequence[str], keys: Sequence[MaskKey], opening: Opening) -> MaskPlan:
    """The masks that the sum over the survivors carries.

    Raises: FedmeshError(WRONG_STATE) while the sum is open; (INVALID_ARGUMENT) for survivors that were not counted, or
        mask keys that are not those of the group; (STATEMENT_INVALID) when a seed does not fit what was advertised.
    """
    held.require_closed()
    if not survivors or list(survivors) != sorted(set(survivors)) or not held.contributions.keys() >= set(survivors):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "survivors must be counted hospitals, each once, sorted", field="survivors"
        )
    positions = [known.position for known in keys]
    if sorted(known.hospital_id for known in keys) != list(held.opened.group) or positions != sorted(set(positions)):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "mask_keys must be those of the group, sorted by position", field="mask_keys"
        )
    return correction(held.attempt.ref, keys, survivors, opening)


def inputs_digest(survivors: Sequence[str], plan: MaskPlan) -> str:
    """A name for what a sum is computed from, hex. The keys in the plan stand for the seeds."""
    digest = hashlib.sha256()
    for name in survivors:
        digest.update(name.encode("ascii") + b"\n")
    for key, sign in plan:
        digest.update(key + (b"+" if sign > 0 else b"-"))
    return digest.hexdigest()
