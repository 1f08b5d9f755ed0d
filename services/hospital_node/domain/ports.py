"""What the node's use cases need from the world, as protocols."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from services.hospital_node.domain.attacks import Attacked, AttackReport
from services.hospital_node.domain.sums import MaskedUpload, SumCheck, SumTerms
from services.hospital_node.domain.tasks import AttemptId, Task
from services.plans.manifest import PlanManifest
from services.privacy.chain import Entry, Head
from services.secure_sum.epoch import EpochKeys
from services.secure_sum.statements import Signed
from services.transparency.findings import Finding

Int64Vector = npt.NDArray[np.int64]
P = ParamSpec("P")
T = TypeVar("T")


class Trainer(Protocol):
    """One plan compiled against one snapshot of local data. Called from one thread only."""

    def initial_state(self) -> bytes:
        """The state of version 0, the same bytes at every hospital: it follows from the plan alone."""
        ...

    def contribution(self, state: bytes, round_number: int) -> Int64Vector:
        """This hospital's integers for a round that builds on `state`: int64[vector_length], clipped, not noised.

        Raises: FedmeshError(DATA_INVALID) when the data leaves nothing to train on.
        """
        ...

    def update(self, state: bytes, total: Int64Vector, contributors: int) -> bytes:
        """The next state from the sum over `contributors` hospitals, int64[vector_length]."""
        ...

    def metrics(self, total: Int64Vector) -> dict[str, float | None]:
        """Validation metrics that follow from the sum of a round that carries them; None where it does not say."""
        ...

    def findings(self, peaks: Mapping[int, float], measured: Int64Vector) -> tuple[Finding, ...]:
        """The results of the hospitals' checks; see `training.checking.find`."""
        ...

    def attack(self, state: bytes) -> tuple[Attacked, ...]:
        """Attacks on membership against this hospital's own rows; what they find must not leave."""
        ...

    def states_close(self, a: bytes, b: bytes) -> bool:
        """Whether two states agree within float tolerance."""
        ...

    def personalise(self, state: bytes) -> bytes:
        """This hospital's own model from the last state, by the plan's `personalisation`; it must not leave."""
        ...


@dataclass(frozen=True)
class LocalJob:
    """A trainer and the digest of the data snapshot (SHA-256 in hex) that it works on.

    population: whose budget pays, when it is not the one that the node's configuration names.
    """

    trainer: Trainer
    data_sha256: str
    population: str | None = None


class TrainerFactory(Protocol):
    def __call__(self, manifest: PlanManifest) -> LocalJob:
        """Read the data, check it against the plan's schema, compile. Slow; runs on the worker thread.

        Raises: FedmeshError(DATA_INVALID, PLAN_INVALID or CONFIG_INVALID).
        """
        ...


@dataclass(frozen=True)
class NoiseRequest:
    """Which noise a contribution must carry: the plan, the round, and the roster's size, which sets the share."""

    manifest: PlanManifest
    round: int
    hospitals: int


class SecureSum(Protocol):
    """The hospital's part in masked sums: protocol steps, each durable on return. Slow; runs on one thread of its own.

    Every method may raise what `services.secure_sum.member.Member` raises for its step: EQUIVOCATION for a second,
    different question in one attempt, STATEMENT_INVALID and PRIVACY_REFUSED for what no honest centre asks, WRONG_STATE
    for what cannot be done (any more); and STORE_FULL.
    """

    def advert(self, terms: SumTerms) -> Signed | None:
        """The attempt's advert, when it was begun and can go on."""
        ...

    def begin(self, terms: SumTerms, values: Int64Vector, age: int) -> Signed:
        """Encrypt `values`, draw the attempt's secrets, keep both; the advert, which says the age of the values.

        Raises: FedmeshError(PLAN_INVALID) when a value does not fit its lane, or the plan's parameter set is not the
            group key's; (WRONG_STATE) when the attempt was begun with values of another age.
        """
        ...

    def share(self, terms: SumTerms, adverts: Sequence[Signed]) -> tuple[Signed, ...]: ...

    def mask(self, terms: SumTerms, sharers: Sequence[str], shares: Sequence[Signed]) -> MaskedUpload:
        """Mask the ciphertext. Nothing of it may leave before `keep`. Masked before, it is the same bytes."""
        ...

    def keep(self, upload: MaskedUpload) -> None:
        """Make a masked upload durable: from now on the attempt has no other."""
        ...

    def settle(self, upload: MaskedUpload) -> None:
        """Delete the unmasked ciphertext, which is of no more use."""
        ...

    def confirm(self, terms: SumTerms, survivors: bytes) -> bytes:
        """A signature over the list of survivors."""
        ...

    def reveal(self, terms: SumTerms, survivors: bytes, confirmations: Mapping[str, bytes]) -> Signed: ...

    def check(self, terms: SumTerms, task: Task) -> SumCheck:
        """What the sum of a DECRYPT task must be, if it is in order."""
        ...

    def verify_segment(self, check: SumCheck, index: int, segments: Mapping[str, bytes], claimed: bytes) -> None:
        """Recompute one segment of the sum from the other survivors' uploads and this hospital's own.

        Raises: FedmeshError(CIPHERTEXT_INVALID) that blames the aggregator.
        """
        ...

    def decrypt(self, check: SumCheck, encrypted_sum: IO[bytes]) -> Int64Vector:
        """The exact sum, int64[vector_length]. Raises: FedmeshError(CIPHERTEXT_INVALID)."""
        ...

    def agree(
        self, check: SumCheck, sum_sha256: str, total: Int64Vector, next_state_sha256: str
    ) -> tuple[bytes, Signed]:
        """The keyed digest of a sum, 32 bytes, and the statement that says it."""
        ...

    def finish(self, attempt: AttemptId) -> None:
        """Delete secrets and ciphertexts of a job's attempts up to this one; hashes stay."""
        ...

    def finish_job(self, job_id: str) -> None:
        """Delete a job's secrets and ciphertexts; hashes stay."""
        ...


class Worker(Protocol):
    """Runs slow functions one at a time on a thread of its own, so that heartbeats keep flowing."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


class NoiseAdder(Protocol):
    """Slow: runs on the worker thread."""

    def add(self, values: Int64Vector, request: NoiseRequest) -> Int64Vector:
        """`values` plus fresh discrete Gaussian noise by the plan; unchanged for a plan without privacy.

        Raises: as `prepare`.
        """
        ...


@dataclass(frozen=True)
class JobFacts:
    """What the registry says about a job. over: it has ended, in whichever way."""

    plan_id: str
    hospital_ids: tuple[str, ...]
    rounds: int
    roster_sha256: str
    over: bool


@dataclass(frozen=True)
class RosterFacts:
    """A roster as the registry has it; nothing of it is verified."""

    statement: bytes
    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class EpochFacts:
    """A key epoch as the registry has it. due: the number to be made now, 0 for none; due_for_s: for how long, s.

    barred: members of the present roster that are suspended or removed. public_key: the due epoch needs one.
    """

    epoch: Signed | None
    due: int
    due_for_s: float
    roster_sha256: str
    barred: tuple[str, ...] = ()
    public_key: bool = False


@dataclass(frozen=True)
class Seen:
    """What a hospital reports about a sum. metrics_json: only the finalizer's counts."""

    sum_sha256: str
    digest: bytes
    signed: Signed
    next_state_sha256: str
    metrics_json: str = field(default="")


@dataclass(frozen=True)
class LedgerStanding:
    """The newest entry of this hospital's ledger that the registry has, with this hospital's signature.

    differs: what was just reported does not go on from it.
    """

    head: Head
    signature: bytes
    differs: bool = False


class Mesh(Protocol):
    """The calls of the centre. Every method raises FedmeshError; `patience_s` bounds the retries of retryable ones."""

    async def get_plan(self, plan_id: str, patience_s: float) -> bytes: ...

    async def get_job(self, job_id: str, patience_s: float) -> JobFacts: ...

    async def download_blob(self, sha256: str, patience_s: float) -> bytes: ...

    async def upload_blob(self, job_id: str, sha256: str, content: bytes, patience_s: float) -> None: ...

    async def list_rosters(self, after_version: int, patience_s: float) -> list[RosterFacts]: ...

    async def get_epoch(self, roster_sha256: str, epoch: int, patience_s: float) -> EpochFacts: ...

    async def publish_epoch(self, epoch: Signed, patience_s: float) -> Signed:
        """The publication that stands, which may be another member's."""
        ...

    async def upload(self, upload: MaskedUpload, patience_s: float) -> None: ...

    async def get_segments(self, attempt: AttemptId, index: int, size: int, patience_s: float) -> dict[str, bytes]:
        """One segment of every other hospital's upload, by hospital.

        Raises: FedmeshError(TOO_LARGE) beyond `size` bytes altogether, names included.
        """
        ...

    async def download_sum(self, attempt: AttemptId, into: IO[bytes], size: int, patience_s: float) -> str:
        """Write an encrypted sum into an empty file; its SHA-256 in hex.

        Raises: FedmeshError(TOO_LARGE) beyond `size` bytes.
        """
        ...

    async def report_ready(self, attempt: AttemptId, base_version: int, advert: Signed, patience_s: float) -> None: ...

    async def submit_shares(self, attempt: AttemptId, shares: Sequence[Signed], patience_s: float) -> None: ...

    async def report_upload(self, upload: MaskedUpload, patience_s: float) -> None: ...

    async def confirm(self, attempt: AttemptId, survivors: bytes, signature: bytes, patience_s: float) -> None: ...

    async def submit_reveal(self, attempt: AttemptId, reveal: Signed, patience_s: float) -> None: ...

    async def submit_digest(self, attempt: AttemptId, seen: Seen, patience_s: float) -> None: ...

    async def submit_state(self, attempt: AttemptId, sha256: str, metrics_json: str, patience_s: float) -> None: ...

    async def attest(self, attempt: AttemptId, sha256: str, reason: str, patience_s: float) -> None: ...

    async def reported_ledger(self, patience_s: float) -> LedgerStanding: ...

    async def report_ledger(
        self, head: Head, signature: bytes, entries: Sequence[Entry], patience_s: float
    ) -> LedgerStanding: ...

    async def report_checks(self, statement: bytes, signature: bytes, patience_s: float) -> None: ...

    async def decline(self, job_id: str, code: str, reason: str, patience_s: float) -> None: ...

    def watch(self, cursor: str) -> AsyncIterator[tuple[str, Task | None]]:
        """Cursors and tasks from the coordinator, None for a heartbeat, until the stream breaks."""
        ...


@dataclass(frozen=True)
class Reservation:
    """What a job asks of the population's budget. Epsilon and delta are 0 for a plan without privacy.

    compositions: most attempts that may be charged: the plan's rounds and extra attempts. metrics_compositions: most of
    these that may carry metrics, a mechanism with noise of its own. cohort: sorted.
    """

    job_id: str
    plan_id: str
    population: str
    private: bool
    epsilon: float
    delta: float
    colluders: int
    compositions: int
    metrics_compositions: int
    cohort: tuple[str, ...]
    data_sha256: str


class Ledger(Protocol):
    """The hospital's own record of privacy spent; authoritative for its patients. Every method is durable on return."""

    def reserve(self, reservation: Reservation) -> None:
        """Set a job's epsilon aside, once; the same again is harmless.

        Raises: FedmeshError(BUDGET_EXHAUSTED, DATA_INVALID when the data changed in mid-job, PRIVACY_REFUSED when the
            cohort did, STORE_FULL).
        """
        ...

    def require_room(self, attempt: AttemptId, *, measured: bool) -> None:
        """Check that `charge` would succeed now. Raises: as `charge`."""
        ...

    def charge(self, attempt: AttemptId, *, measured: bool) -> None:
        """Mark an attempt as spent, before its first byte leaves; the same attempt again is harmless.

        measured: the contribution carries metrics, which are a release of their own.

        Raises: FedmeshError(BUDGET_EXHAUSTED, PRIVACY_REFUSED without a reservation, STORE_FULL).
        """
        ...

    def charged(self, attempt: AttemptId) -> bool: ...

    def head(self) -> Head:
        """The newest entry."""
        ...

    def has(self, head: Head) -> bool:
        """Whether a head that was kept elsewhere is one of this ledger's entries."""
        ...

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        """At most `limit` entries above a number, oldest first."""
        ...

    def unused(self) -> list[str]:
        """Jobs whose reservation counts although nothing was ever charged; 1,000 at most."""
        ...

    def release(self, job_id: str) -> bool:
        """Give a job's reservation back if nothing was ever charged; answers whether it did."""
        ...


class NodeState(Protocol):
    """The node's durable memory beside the ledger and the secure sums."""

    def cursor(self) -> str: ...

    def save_cursor(self, cursor: str) -> None: ...

    def rosters(self) -> list[RosterFacts]:
        """The rosters that were verified here after the founding one, oldest first."""
        ...

    def save_roster(self, version: int, facts: RosterFacts) -> None:
        """Remember a verified roster for good."""
        ...

    def save_blob(self, job_id: str, content: bytes) -> str:
        """Keep a sealed model state of a job under its SHA-256, which is returned."""
        ...

    def blob(self, sha256: str) -> bytes | None: ...

    def adopt(self, job_id: str, version: int, sha256: str) -> int:
        """Remember a committed version, unless a newer one was adopted; the newest that is adopted now.

        States that are neither it nor the one before are deleted.
        """
        ...


@dataclass(frozen=True)
class KeptEpoch:
    """An epoch on disk. since: when it was saved, UTC."""

    roster_sha256: str
    epoch: int
    since: datetime


class PersonalStore(Protocol):
    """This hospital's own models, sealed under a key of its own. Every method is durable on return."""

    def save(self, job_id: str, version: int, model: bytes) -> None:
        """Keep the personal model of a job, made from its version `version`. Raises: FedmeshError(STORE_FULL)."""
        ...

    def load(self, job_id: str, version: int) -> bytes | None:
        """What was kept; None also when it is damaged or of another version, for it can be made again."""
        ...


class AttackStore(Protocol):
    """What attacks found in this hospital's own rows. Every method is durable on return."""

    def save(self, report: AttackReport) -> None:
        """Keep a job's report in place of an older one. Raises: FedmeshError(STORE_FULL)."""
        ...

    def has(self, job_id: str, version: int) -> bool:
        """Whether there is a report on this version."""
        ...


@dataclass(frozen=True)
class Measured:
    """What opened sums told of a job's model.

    peaks: by round, the largest |coordinate| as a part of half a lane's range. values: the measuring round's sum behind
    the training part, int64; None until it was opened.
    """

    peaks: Mapping[int, float]
    values: Int64Vector | None


class MeasuredStore(Protocol):
    """What rounds told, kept until the job's checks are reported. Every method is durable on return."""

    def note(self, job_id: str, seen: Measured) -> None:
        """Add to what is kept of a job. Raises: FedmeshError(STORE_FULL)."""
        ...

    def load(self, job_id: str) -> Measured:
        """What is kept; nothing also when it is damaged."""
        ...

    def forget(self, job_id: str) -> None: ...


class EpochStore(Protocol):
    """The keys of epochs, in files of this hospital. Every method is durable on return."""

    def save(self, keys: EpochKeys) -> None: ...

    def load(self, roster_sha256: str, epoch: int) -> EpochKeys | None:
        """What is kept: without a group key once it was retired."""
        ...

    def kept(self) -> list[KeptEpoch]:
        """The epochs whose group key is kept."""
        ...

    def retire(self, roster_sha256: str, epoch: int) -> None:
        """Destroy an epoch's group key; its state key stays."""
        ...
