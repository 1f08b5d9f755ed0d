"""What the steps of a masked sum are about."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.tasks import AttemptId
from services.secure_sum.derive import MaskPlan
from services.secure_sum.epoch import EpochKeys
from services.secure_sum.roster import Roster
from services.secure_sum.statements import Signed, Upload
from services.secure_sum.wire import Layout


@dataclass(frozen=True)
class SumTerms:
    """What one attempt's sum is bound to: a verified roster, an epoch's keys, the cohort, the form, and the greatest
    age of a contribution.
    """

    attempt: AttemptId
    roster: Roster
    keys: EpochKeys
    cohort: tuple[str, ...]
    layout: Layout
    oldest: int = 0

    def require_group_key(self) -> bytes:
        """Raises: FedmeshError(WRONG_STATE) when the epoch is over and its group key destroyed."""
        if not self.keys.group_key:
            raise FedmeshError(Code.WRONG_STATE, f"the group key of epoch {self.keys.epoch} was destroyed")
        return self.keys.group_key


@dataclass(frozen=True)
class MaskedUpload:
    """A masked ciphertext on disk with its signed statement. segments: reads it anew at every call, one at a time."""

    attempt: AttemptId
    layout: Layout
    signed: Signed
    ciphertext_sha256: str
    segments: Callable[[], Iterator[bytes]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class SumCheck:
    """What a sum must be: the survivors' uploads, and the masks that they still carry together."""

    terms: SumTerms
    uploads: Mapping[str, Upload]
    correction: MaskPlan = field(repr=False)
