"""What travels between the centre and a hospital, close to the coordinator's protobuf messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from services.secure_sum.opening import Opening
from services.secure_sum.statements import AttemptRef, Signed
from tests.simulation.arithmetic import Segments


class Step(IntEnum):
    """The steps of an attempt, in order."""

    TRAIN = 0
    SHARE = 1
    UPLOAD = 2
    CONFIRM = 3
    UNMASK = 4
    AGREE = 5


@dataclass(frozen=True)
class Task:
    """Asks a hospital for one step; carries all that the step needs."""

    step: Step
    attempt: AttemptRef
    cohort: tuple[str, ...]
    epoch: int
    oldest: int = 0
    """The greatest age of a contribution."""
    adverts: tuple[Signed, ...] = ()
    sharers: tuple[str, ...] = ()
    shares: tuple[Signed, ...] = ()
    survivors: bytes = b""
    confirmations: Mapping[str, bytes] = field(default_factory=dict)
    opening: Opening | None = None
    uploads: tuple[Signed, ...] = ()
    ciphertexts: Mapping[str, Segments] = field(default_factory=dict)
    total: Segments = ()


@dataclass(frozen=True)
class Answer:
    """A hospital's answer to a task."""

    hospital_id: str
    step: Step
    attempt: AttemptRef
    signed: tuple[Signed, ...] = ()
    """TRAIN: the advert. SHARE: the shares. UPLOAD, UNMASK, AGREE: the one statement."""
    ciphertext: Segments = ()
    """UPLOAD."""
    signature: bytes = b""
    """CONFIRM."""
