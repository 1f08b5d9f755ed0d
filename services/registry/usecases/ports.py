"""What the use cases need from a store. `services.registry.store` implements it on PostgreSQL."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from services.common.identity import Identity
from services.privacy.chain import Entry, Head
from services.registry.domain.enrolment import Certificate, Invitation
from services.registry.domain.entities import (
    BlobHeader,
    CommittedRound,
    EpochRecords,
    Event,
    Hospital,
    HospitalStatus,
    Job,
    JobStatus,
    KeyEpoch,
    LedgerReport,
    Metric,
    ModelVersion,
    OpenedAttempt,
    Page,
    Plan,
    PublishedRoster,
    ReportedLedger,
    Strike,
    SurvivorList,
)
from services.registry.usecases.membership_ports import MembershipChanges
from services.registry.usecases.performance_ports import Performance
from services.registry.usecases.promotion_ports import Promotions

T = TypeVar("T")


@dataclass(frozen=True)
class Command(Generic[T]):
    """A mutation with its idempotency key.

    content_sha256: digest of the request, 32 bytes. encode: the wire form of the answer, which is kept.
    """

    request_id: UUID
    caller: Identity
    method: str
    content_sha256: bytes
    encode: Callable[[T], bytes]


class Requests(Protocol):
    async def answer(self, command: Command[T]) -> bytes | None:
        """The answer that this request got before; None for a new one.

        Raises: FedmeshError(REQUEST_ID_REUSED) when the id belongs to another caller, method or content.
        """
        ...

    async def keep(self, command: Command[T], answer: bytes, at: datetime) -> None:
        """Remember the answer. A concurrent twin makes the transaction run again, and then find it."""
        ...


class Hospitals(Protocol):
    async def add(self, hospital: Hospital) -> bool:
        """Store a hospital; False when the id is taken."""
        ...

    async def get(self, hospital_ids: Sequence[str], *, lock: bool = False) -> dict[str, Hospital]:
        """The registered hospitals among those named. `lock` keeps them unchanged until the transaction ends."""
        ...

    async def touch(self, hospital_ids: Sequence[str]) -> None:
        """Make concurrent transactions that lock these hospitals run again, and so see what this one adds."""
        ...

    async def set_status(self, hospital_id: str, status: HospitalStatus, at: datetime) -> None: ...

    async def forgive(self, hospital_id: str, at: datetime) -> None:
        """Strikes up to this moment no longer count."""
        ...

    async def add_strike(self, strike: Strike) -> None: ...

    async def strikes(self, hospital_id: str, since: datetime) -> int:
        """Strikes after a moment that still count."""
        ...

    async def list(self, strikes_since: datetime) -> tuple[Hospital, ...]:
        """All hospitals by id, 2,000 at most, with the strikes that count since then."""
        ...


class Credentials(Protocol):
    async def invite(self, invitation: Invitation) -> None:
        """Store an invitation; one of the hospital that is still open is withdrawn."""
        ...

    async def withdraw(self, hospital_id: str, at: datetime) -> None:
        """Withdraw the open invitation of a hospital, if there is one."""
        ...

    async def invitation(self, token_sha256: str) -> Invitation | None:
        """The invitation of a token, locked until the transaction ends."""
        ...

    async def use(self, token_sha256: str, serial: str, at: datetime) -> None:
        """The token became this certificate."""
        ...

    async def add(self, certificate: Certificate) -> None:
        """Store a certificate. A concurrent one of the same key or beginning makes the transaction run again."""
        ...

    async def certificate(self, hospital_id: str, serial: str) -> Certificate | None: ...

    async def newest(self, hospital_id: str) -> Certificate | None:
        """The certificate of a hospital that begins last."""
        ...

    async def has_key(self, key_sha256: str) -> bool:
        """Whether the key was ever certified, for whomever."""
        ...

    async def revoke_before(self, hospital_id: str, moment: datetime) -> None:
        """Certificates of a hospital that begin before a moment count no longer."""
        ...


class Rosters(Protocol):
    async def add(self, published: PublishedRoster) -> None:
        """Store a roster. A concurrent one of the same version makes the transaction run again."""
        ...

    async def present(self) -> PublishedRoster | None: ...

    async def get(self, sha256: str) -> PublishedRoster | None: ...

    async def after(self, version: int) -> tuple[PublishedRoster, ...]:
        """Rosters above a version, oldest first, 500 at most."""
        ...

    async def add_epoch(self, epoch: KeyEpoch) -> None:
        """Store a key epoch. A concurrent one of the same number makes the transaction run again."""
        ...

    async def epoch(self, roster_sha256: str, number: int | None) -> KeyEpoch | None:
        """A key epoch of a roster, the newest when `number` is None."""
        ...

    async def epoch_records(
        self, roster_sha256: str, number: int, parameter_sets: Sequence[str]
    ) -> EpochRecords | None:
        """What an epoch's standing follows from, in one statement. Roster and number: as asked, "" and 0 for the
        present roster's newest. parameter_sets: of which the first approved plan is looked for.

        None when there is no roster at all.
        """
        ...


class Plans(Protocol):
    async def add(self, plan: Plan) -> bool:
        """Store a plan; False when it is there already."""
        ...

    async def get(self, plan_id: str, *, lock: bool = False) -> Plan | None: ...

    async def approve(self, plan_id: str, approved_by: str) -> None: ...

    async def first_of(self, parameter_sets: Sequence[str]) -> datetime | None:
        """When the first approved plan of one of these sets was proposed; None when there is none."""
        ...

    async def page(self, size: int, before: int | None) -> Page[Plan]:
        """Newest first, without manifests."""
        ...


class Jobs(Protocol):
    async def add(self, job: Job) -> None: ...

    async def get(self, job_id: UUID, *, lock: bool = False) -> Job | None:
        """A job that the transaction may see. `lock` makes all changes of a job one after another."""
        ...

    async def touch(self, job_id: UUID) -> None:
        """Make concurrent transactions that wait for the job's lock run again, and so see what this one adds."""
        ...

    async def end(self, job_id: UUID, status: JobStatus, reason: str, at: datetime) -> None: ...

    async def page(self, status: JobStatus | None, size: int, before: int | None) -> Page[Job]:
        """Newest first."""
        ...

    async def running_with(self, hospital_ids: Sequence[str]) -> tuple[Job, ...]:
        """Running jobs with any of these hospitals in their cohort or in their roster, locked."""
        ...

    async def newest_attempt(self, job_id: UUID, round_number: int) -> tuple[int, int | None]:
        """The number of the newest attempt at a round and its key epoch; 0 and None when none was opened."""
        ...

    async def add_attempt(self, opened: OpenedAttempt, reason: str, at: datetime) -> None: ...


class Survivors(Protocol):
    async def add(self, told: SurvivorList) -> None:
        """Store the survivors of a round. A concurrent list of the same round makes the transaction run again."""
        ...

    async def get(self, job_id: UUID, round_number: int, *, details: bool = False) -> SurvivorList | None:
        """The survivors of a round, `details` only when asked for."""
        ...

    async def drop_details(self, job_id: UUID) -> None:
        """Forget the coordinator's records of a job's attempts."""
        ...


class Ledgers(Protocol):
    async def newest(self, hospital_id: str) -> tuple[Head, bytes]:
        """The newest entry of a hospital's reported ledger, with the hospital's signature; empty before the first."""
        ...

    async def sha256s(self, hospital_id: str, first: int, last: int) -> dict[int, str]:
        """SHA-256 of reported entries by number, from `first` to `last`."""
        ...

    async def add(self, report: LedgerReport, at: datetime) -> None:
        """Store entries that go on from the newest. A concurrent report makes the transaction run again."""
        ...

    async def heads(self, hospital_id: str) -> tuple[ReportedLedger, ...]:
        """The hospitals that the transaction may see, or one of them, by name; some have reported nothing."""
        ...

    async def after(self, hospital_id: str, seq: int, size: int) -> Sequence[Entry]:
        """Entries above a number, oldest first."""
        ...

    async def newer(self, known: Mapping[str, int], size: int) -> Sequence[tuple[str, Entry]]:
        """Entries of all hospitals above the numbers that are known, by hospital and number."""
        ...


class Rounds(Protocol):
    async def add(self, committed: CommittedRound, metrics: Mapping[str, float]) -> None:
        """Store a round, its contributions and metrics, and move the job to its version."""
        ...

    async def content_sha256(self, job_id: UUID, version: int) -> bytes | None:
        """Digest of what the coordinator sent to commit this version; None when it is not committed."""
        ...

    async def after(self, job_id: UUID, version: int, size: int) -> tuple[CommittedRound, ...]:
        """Rounds above a version, oldest first."""
        ...

    async def model_version(self, job_id: UUID, version: int | None) -> ModelVersion | None:
        """One version, the newest when it is None."""
        ...

    async def page(self, job_id: UUID | None, size: int, before: int | None) -> Page[tuple[int, ModelVersion]]:
        """Model versions with their page keys, newest first."""
        ...

    async def metrics(self, job_id: UUID, name: str | None) -> tuple[Metric, ...]:
        """Oldest first; the newest 5,000 when there are more."""
        ...


class Blobs(Protocol):
    async def size_in_job(self, job_id: UUID, sha256: str) -> int | None:
        """Size in bytes of a blob that belongs to a job; None when it does not."""
        ...

    async def add(self, header: BlobHeader, hospital_id: str, chunks: Iterable[bytes], at: datetime) -> None:
        """Store a blob whose content was checked, and give it to the job."""
        ...

    async def size(self, sha256: str) -> int | None:
        """Size in bytes of a blob that the transaction may see."""
        ...

    async def chunk(self, sha256: str, position: int) -> bytes | None:
        """One chunk; None behind the last."""
        ...


class Outbox(Protocol):
    async def add(self, events: Sequence[Event]) -> None:
        """Write events; ids that are there already are skipped."""
        ...

    async def claim(self, limit: int, seconds: float) -> tuple[Event, ...]:
        """Take the oldest waiting events for some seconds; other relays pass them over meanwhile."""
        ...

    async def placed(self, indices: dict[UUID, int]) -> None:
        """The audit log holds these events at these indices."""
        ...

    async def release(self, event_ids: Sequence[UUID]) -> None:
        """Give claimed events back."""
        ...

    async def index(self, event_id: UUID) -> int | None:
        """Where the audit log holds an event; None when it does not yet."""
        ...

    async def refused(self, event_id: UUID, reason: str) -> None:
        """The audit log refuses this event for good; it is set aside for an operator."""
        ...

    async def backlog(self) -> tuple[int, float, int]:
        """Events waiting, age of the oldest in seconds, events set aside."""
        ...


class Transaction(Protocol):
    """The nouns of one transaction. What is not visible to its caller does not exist in it."""

    @property
    def requests(self) -> Requests: ...
    @property
    def hospitals(self) -> Hospitals: ...
    @property
    def credentials(self) -> Credentials: ...
    @property
    def membership(self) -> MembershipChanges: ...
    @property
    def plans(self) -> Plans: ...
    @property
    def rosters(self) -> Rosters: ...
    @property
    def jobs(self) -> Jobs: ...
    @property
    def survivors(self) -> Survivors: ...
    @property
    def ledgers(self) -> Ledgers: ...
    @property
    def rounds(self) -> Rounds: ...
    @property
    def performance(self) -> Performance: ...
    @property
    def blobs(self) -> Blobs: ...
    @property
    def promotions(self) -> Promotions: ...
    @property
    def outbox(self) -> Outbox: ...


class Store(Protocol):
    async def run(
        self, name: str, caller: Identity | None, body: Callable[[Transaction], Awaitable[T]], *, whole: bool = False
    ) -> T:
        """Run `body` in one transaction on behalf of a caller; None is the registry itself. It may run several times.

        whole: `body` sees everything, once a hospital was found active; for what many hospitals signed together.

        Raises: FedmeshError(PERMISSION_DENIED) for a hospital that is not an active member, (STORE_UNAVAILABLE |
            STORE_FULL | LOST_RACE); whatever `body` raises.
        """
        ...

    async def ask(
        self, name: str, caller: Identity | None, body: Callable[[Transaction], Awaitable[T]], *, whole: bool = False
    ) -> T:
        """As `run`, for a body that makes exactly one statement, and one that reads: it takes one round trip."""
        ...


class BlobStream(Protocol):
    """The chunks of an upload, in order."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
