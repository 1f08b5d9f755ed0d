"""What a sum is, who may add to it, and when it is fixed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

from services.common.errors import Code, FedmeshError
from services.secure_sum.parameters import ParameterSet, parameter_set
from services.secure_sum.wire import upload_size

MIN_GROUP: Final = 2
MAX_LIFETIME: Final = timedelta(days=7)


class AttemptId(NamedTuple):
    """One try at one round of one job."""

    job_id: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.job_id}/{self.round}/{self.attempt}"


class Form(NamedTuple):
    """The form of every contribution to a sum; see `fedmesh.common.v1.SumForm`."""

    parameter_set: str
    lanes: int
    vector_length: int

    @property
    def parameters(self) -> ParameterSet:
        """Raises: FedmeshError(INVALID_ARGUMENT) for an unknown set."""
        return parameter_set(self.parameter_set)

    @property
    def upload_bytes(self) -> int:
        """Exact size of an upload in bytes.

        Raises: FedmeshError(INVALID_ARGUMENT) for an unknown set, lane count or length.
        """
        return upload_size(self.parameters, self.vector_length, self.lanes)


class State(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True)
class Blob:
    """An immutable accumulator, stored in chunks. `sha256` is of all its bytes, 64 hex digits."""

    blob_id: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Sum:
    """The record of one attempt's sum. `version` counts its accumulators; `blob` is None while nothing was added.

    contributions: SHA-256 of the ciphertext by hospital. unrecorded: contributors whose event may not be durable yet.
    """

    attempt: AttemptId
    form: Form
    group: tuple[str, ...]
    state: State
    expires_at: datetime
    version: int = 0
    blob: Blob | None = None
    contributions: Mapping[str, str] = field(default_factory=dict)
    unrecorded: frozenset[str] = frozenset()

    def counted(self, hospital_id: str, sha256: str) -> bool:
        """Whether these bytes are in the sum already.

        Raises: FedmeshError(PERMISSION_DENIED) for a hospital outside the group; (ALREADY_CONTRIBUTED) when it sent
            other bytes before; (WRONG_STATE) when they are new and the sum is closed.
        """
        if hospital_id not in self.group:
            raise FedmeshError(Code.PERMISSION_DENIED, f"hospital {hospital_id} is not in the group of this attempt")
        before = self.contributions.get(hospital_id)
        if before == sha256:
            return True
        if before is not None:
            raise FedmeshError(
                Code.ALREADY_CONTRIBUTED,
                "another ciphertext of this hospital is in this attempt's sum: send the same bytes, or wait for a new "
                "attempt",
                counted_sha256=before,
            )
        if self.state is not State.OPEN:
            raise FedmeshError(Code.WRONG_STATE, "the sum is closed: wait for the next attempt")
        return False

    def require_member(self, hospital_id: str) -> None:
        """Raises: FedmeshError(PERMISSION_DENIED) for a hospital outside the group."""
        if hospital_id not in self.group:
            raise FedmeshError(Code.PERMISSION_DENIED, f"hospital {hospital_id} is not in the group of this attempt")

    def require_form(self, form: Form) -> None:
        """Raises: FedmeshError(CIPHERTEXT_INVALID) when a contribution would have another form."""
        if form != self.form:
            raise FedmeshError(
                Code.CIPHERTEXT_INVALID,
                f"this sum takes {self.form.parameter_set} with {self.form.lanes} lane(s) and "
                f"{self.form.vector_length} values, not {form.parameter_set[:64]} with {form.lanes} and "
                f"{form.vector_length}",
            )


def require_openable(form: Form, group: tuple[str, ...], expires_at: datetime, now: datetime) -> int:
    """The size of an upload in bytes, if a sum may be opened so.

    Raises: FedmeshError(INVALID_ARGUMENT) for a bad form, group or time.
    """
    size = form.upload_bytes
    most = form.parameters.max_contributions
    if not MIN_GROUP <= len(group) <= most or list(group) != sorted(set(group)):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"group must name {MIN_GROUP} to {most} hospitals, sorted", field="group"
        )
    if not now < expires_at <= now + MAX_LIFETIME:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"expires_at must lie in the future, at most {MAX_LIFETIME.days} days ahead",
            field="expires_at",
        )
    return size


def not_open(attempt: AttemptId) -> FedmeshError:
    return FedmeshError(
        Code.NOT_FOUND,
        f"there is no sum for round {attempt.round}, attempt {attempt.attempt}: it was not opened, or it is over",
    )
