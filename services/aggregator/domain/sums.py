"""What a sum is, who may add to it, and when it is fixed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

from services.common.errors import Code, FedmeshError
from services.secure_sum.statements import AttemptRef
from services.secure_sum.wire import Layout, layout_of

MIN_GROUP: Final = 2
MAX_LIFETIME: Final = timedelta(days=7)
_KEY_BYTES: Final = 32


class AttemptId(NamedTuple):
    """One try at one round of one job."""

    job_id: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.job_id}/{self.round}/{self.attempt}"

    @property
    def ref(self) -> AttemptRef:
        """As statements name it."""
        return AttemptRef(job_id=self.job_id, round=self.round, attempt=self.attempt)


class Form(NamedTuple):
    """The form of every contribution to a sum; see `fedmesh.common.v1.SumForm`."""

    parameter_set: str
    lanes: int
    vector_length: int

    @property
    def layout(self) -> Layout:
        """Raises: FedmeshError(INVALID_ARGUMENT) for an unknown set, lane count or length."""
        return layout_of(self.parameter_set, self.vector_length, self.lanes)


class State(StrEnum):
    """COMPUTED follows CLOSED follows OPEN."""

    OPEN = "open"
    CLOSED = "closed"
    COMPUTED = "computed"


@dataclass(frozen=True)
class Blob:
    """The name of immutable chunks, one a segment, and the moment until which they are kept."""

    blob_id: str
    expires_at: datetime


@dataclass(frozen=True)
class Opened:
    """What a sum was opened with: its form, who may contribute, and by what their statements are checked.

    signers: Ed25519 public keys by hospital, exactly those of the group. adverts: digest of the attempt's adverts.
    """

    form: Form
    group: tuple[str, ...]
    signers: Mapping[str, bytes]
    adverts_sha256: str


class Contribution(NamedTuple):
    """One counted upload: the SHA-256 of its ciphertext and of its statement, and where its segments are."""

    ciphertext_sha256: str
    upload_sha256: str
    blob_id: str


@dataclass(frozen=True)
class Sum:
    """The record of one attempt's sum. unrecorded: contributors whose event may not be durable yet.

    result: the encrypted sum and its SHA-256, once computed.
    """

    attempt: AttemptId
    opened: Opened
    state: State
    expires_at: datetime
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    unrecorded: frozenset[str] = frozenset()
    result: tuple[Blob, str] | None = None

    @property
    def layout(self) -> Layout:
        return self.opened.form.layout

    def blob(self, hospital_id: str) -> Blob:
        """Where a counted upload's segments are."""
        return Blob(self.contributions[hospital_id].blob_id, self.expires_at)

    def blobs(self) -> list[Blob]:
        """Everything that is stored for this sum."""
        result = [] if self.result is None else [self.result[0]]
        return [self.blob(name) for name in self.contributions] + result

    def counted(self, hospital_id: str, ciphertext_sha256: str, upload_sha256: str) -> bool:
        """Whether this upload is counted already.

        Raises: FedmeshError(PERMISSION_DENIED) for a hospital outside the group; (ALREADY_CONTRIBUTED) when it sent
            other bytes before; (WRONG_STATE) when they are new and the sum is closed.
        """
        self.require_member(hospital_id)
        before = self.contributions.get(hospital_id)
        if before is None:
            if self.state is not State.OPEN:
                raise FedmeshError(Code.WRONG_STATE, "the sum is closed: wait for the next attempt")
            return False
        if before[:2] == (ciphertext_sha256, upload_sha256):
            return True
        raise FedmeshError(
            Code.ALREADY_CONTRIBUTED,
            "another upload of this hospital is counted in this attempt: send the same bytes, or wait for the next one",
            counted_sha256=before.ciphertext_sha256,
        )

    def require_member(self, hospital_id: str) -> None:
        """Raises: FedmeshError(PERMISSION_DENIED) for a hospital outside the group."""
        if hospital_id not in self.opened.group:
            raise FedmeshError(Code.PERMISSION_DENIED, f"hospital {hospital_id} is not in the group of this attempt")

    def require_closed(self) -> None:
        """Raises: FedmeshError(WRONG_STATE) while uploads are taken."""
        if self.state is State.OPEN:
            raise FedmeshError(Code.WRONG_STATE, "the sum is still open: wait until it is closed")


def require_openable(opened: Opened, expires_at: datetime, now: datetime) -> int:
    """The size of an upload in bytes, if a sum may be opened so.

    Raises: FedmeshError(INVALID_ARGUMENT) for a bad form, group, keys or time.
    """
    layout, group = opened.form.layout, opened.group
    most = layout.params.max_contributions
    if not MIN_GROUP <= len(group) <= most or list(group) != sorted(set(group)):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"group must name {MIN_GROUP} to {most} hospitals, sorted", field="group"
        )
    if opened.signers.keys() != set(group) or any(len(key) != _KEY_BYTES for key in opened.signers.values()):
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"signers must hold one key of {_KEY_BYTES} bytes for each of the group",
            field="signers",
        )
    if not now < expires_at <= now + MAX_LIFETIME:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"expires_at must lie in the future, at most {MAX_LIFETIME.days} days ahead",
            field="expires_at",
        )
    return layout.upload_bytes


def not_open(attempt: AttemptId) -> FedmeshError:
    return FedmeshError(
        Code.NOT_FOUND,
        f"there is no sum for round {attempt.round}, attempt {attempt.attempt}: it was not opened, or it is over",
    )
