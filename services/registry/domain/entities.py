"""The things that the registry remembers. Times are UTC-aware; digests are SHA-256 in 64 lower-case hex digits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Generic, TypeVar
from uuid import UUID

from services.privacy.chain import Entry, Head
from services.secure_sum.parameters import DEFAULT
from services.secure_sum.roster import Roster
from services.secure_sum.statements import EpochStatement, Signed, parse

MAX_PAGE: Final = 500
DEFAULT_PAGE: Final = 100


class HospitalStatus(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REMOVED = "removed"


class PlanStatus(StrEnum):
    PROPOSED = "proposed"
    APPROVED = "approved"


class JobStatus(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Hospital:
    """A member of the consortium.

    strikes: those that count now; known in listings only. certificates_from: those that begin before are revoked.
    certificate_not_after: end of the newest certificate that the registry issued; known in listings only. standing_at:
    when `status` changed last.
    """

    hospital_id: str
    display_name: str
    status: HospitalStatus
    created_at: datetime
    strikes: int = 0
    certificates_from: datetime | None = None
    certificate_not_after: datetime | None = None
    standing_at: datetime | None = None


@dataclass(frozen=True)
class Strike:
    """Something that no honest node sends. `attempt` is (job, round, attempt), None outside of one."""

    hospital_id: str
    request_id: UUID
    code: str
    reason: str
    attempt: tuple[UUID, int, int] | None
    reported_by: str
    at: datetime


@dataclass(frozen=True)
class StrikeRule:
    """At `limit` strikes within `window_s` seconds a hospital is suspended."""

    limit: int
    window_s: float


@dataclass(frozen=True)
class PublishedRoster:
    """A roster that was verified when it came, as it came."""

    roster: Roster
    statement: bytes
    signatures: Mapping[str, bytes]
    published_by: str
    published_at: datetime


@dataclass(frozen=True)
class KeyEpoch:
    """The sealed keys of an epoch: the first publication of this number."""

    roster_sha256: str
    epoch: int
    signed: Signed
    published_at: datetime

    @property
    def has_public_key(self) -> bool:
        return parse(EpochStatement, self.signed.statement).public_key is not None


@dataclass(frozen=True)
class EpochRecords:
    """What follows, about the key epochs of the present roster and one that was asked for, from what is stored.

    roster_sha256, roster_published_at, newest, members: of the present roster. found: the epoch asked for; None where
    there is none, or no such roster, which `roster_known` tells. public_since: see `due_epoch`.
    """

    roster_sha256: str
    roster_published_at: datetime
    roster_known: bool
    found: KeyEpoch | None
    newest: KeyEpoch | None
    members: tuple["MemberStanding", ...]
    public_since: datetime | None


@dataclass(frozen=True)
class MemberStanding:
    """A member of a roster as it is registered. standing_at: when `status` changed last; None for never."""

    hospital_id: str
    status: HospitalStatus
    standing_at: datetime | None


@dataclass(frozen=True)
class EpochStanding:
    """An epoch that was asked for, and what is due. due: number to be made now, 0 for none; due_for_s: since when.

    barred: members of the present roster that are not active. public_key: the next epoch must have a public key.
    """

    found: KeyEpoch | None
    due: int
    due_for_s: float
    present_roster: str
    barred: tuple[str, ...] = ()
    public_key: bool = False


@dataclass(frozen=True)
class OpenedAttempt:
    """An attempt with the roster and key epoch that it is bound to."""

    job_id: UUID
    round: int
    attempt: int
    roster_sha256: str
    epoch: int


@dataclass(frozen=True)
class SurvivorList:
    """Confirmed survivors of an attempt. `details` is the coordinator's own record, empty once it was dropped."""

    job_id: UUID
    round: int
    attempt: int
    statement: bytes
    confirmations: Mapping[str, bytes]
    details: bytes
    stored_at: datetime


@dataclass(frozen=True)
class Plan:
    """A declarative training plan. `manifest` is its canonical JSON, empty in listings; `plan_id` is its digest.

    parameter_set: of the secure sum.
    """

    plan_id: str
    name: str
    manifest: bytes
    rounds: int
    private: bool
    status: PlanStatus
    proposed_by: str
    approved_by: str | None
    created_at: datetime
    parameter_set: str = DEFAULT.name


@dataclass(frozen=True)
class Job:
    """One training by one plan.

    hospital_ids: the sorted cohort. state_sha256: of the newest version that was not burnt, empty before the first.
    roster_sha256, roster_size: the roster that it is bound to; empty and 0 for a job from before there were rosters.
    """

    job_id: UUID
    plan_id: str
    plan_name: str
    private: bool
    hospital_ids: tuple[str, ...]
    status: JobStatus
    reason: str
    rounds: int
    version: int
    state_sha256: str
    created_at: datetime
    ended_at: datetime | None
    roster_sha256: str
    roster_size: int


@dataclass(frozen=True)
class Contribution:
    """One accepted upload. age: in versions, of what it was trained on; its weight follows from it."""

    hospital_id: str
    ciphertext_sha256: str
    age: int = 0


@dataclass(frozen=True)
class Round:
    """How version `version` of a job came to be, as the coordinator tells it.

    upload_bytes: size of one hospital's upload. content_sha256: digest of what was told, 32 bytes. burnt: the version
    is used up without a new state; `state_sha256` is then the one before or empty, `sum_sha256` and `finalizer` may be
    empty. survivors_sha256: empty in rounds from before there were masks.
    """

    job_id: UUID
    version: int
    attempt: int
    contributions: tuple[Contribution, ...]
    sum_sha256: str
    agreeing: tuple[str, ...]
    dissenting: tuple[str, ...]
    finalizer: str
    attesting: tuple[str, ...]
    state_sha256: str
    metrics_json: str
    upload_bytes: int
    sealed_at: datetime
    content_sha256: bytes
    survivors_sha256: str
    burnt: bool = False
    burnt_reason: str = ""


@dataclass(frozen=True)
class CommittedRound:
    """A round in the registry. `contributions_root` is the Merkle root over its contributions, in hex; `event_id` the
    event that tells the audit log of it, None for rounds of earlier releases."""

    round: Round
    contributions_root: str
    committed_at: datetime
    event_id: UUID | None = None


@dataclass(frozen=True)
class ModelVersion:
    """A model version with its lineage; `size_bytes` is the state's size, 0 when every version so far was burnt."""

    plan_id: str
    plan_name: str
    private: bool
    final: bool
    size_bytes: int
    committed: CommittedRound


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    job_id: UUID
    version: int
    name: str
    value: float
    recorded_at: datetime


@dataclass(frozen=True)
class Event:
    """Something that happened, for the audit log. `body_json` is a canonical JSON object."""

    event_id: UUID
    type: str
    occurred_at: datetime
    actor: str
    subject: str
    body_json: str


@dataclass(frozen=True)
class BlobHeader:
    """What a hospital says it is about to send."""

    job_id: UUID
    sha256: str
    size_bytes: int


ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Page(Generic[ItemT]):
    """A piece of a list. `next_before` is the key to go on below; None on the last page."""

    items: tuple[ItemT, ...]
    next_before: int | None = field(default=None)


@dataclass(frozen=True)
class LedgerReport:
    """A part of a hospital's privacy ledger: its head with the hospital's signature, and entries that lead to it."""

    hospital_id: str
    head: Head
    signature: bytes
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class LedgerStanding:
    """What the registry has after a report. differs: the reported ledger does not go on from it."""

    head: Head
    signature: bytes
    differs: bool


@dataclass(frozen=True)
class ReportedLedger:
    """The newest entry that a hospital has reported; none and no time when it has reported nothing.

    uncharged: its contributions to rounds of private plans for which it has reported no charge.
    """

    hospital_id: str
    head: Head
    signature: bytes
    reported_at: datetime | None
    uncharged: int
