"""What the node's use cases need from the world, as protocols."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from services.hospital_node.domain.tasks import AttemptId, Task
from services.plans.manifest import PlanManifest

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

    def states_close(self, a: bytes, b: bytes) -> bool:
        """Whether two states agree within float tolerance."""
        ...


@dataclass(frozen=True)
class LocalJob:
    """A trainer and the digest of the data snapshot (SHA-256 in hex) that it works on."""

    trainer: Trainer
    data_sha256: str


class TrainerFactory(Protocol):
    def __call__(self, manifest: PlanManifest) -> LocalJob:
        """Read the data, check it against the plan's schema, compile. Slow; runs on the worker thread.

        Raises: FedmeshError(DATA_INVALID, PLAN_INVALID or CONFIG_INVALID).
        """
        ...


@dataclass(frozen=True)
class NoiseRequest:
    """Which noise a contribution must carry: the plan, the round, and the cohort whose size sets the share."""

    manifest: PlanManifest
    round: int
    hospitals: int


class SecretSum(Protocol):
    """The hospital's end of the secure sum, under the group key. Slow; runs on the worker thread."""

    def encrypt(self, values: Int64Vector, manifest: PlanManifest) -> bytes:
        """An upload with fresh randomness. Raises: FedmeshError(PLAN_INVALID) when a value does not fit its lane."""
        ...

    def size(self, manifest: PlanManifest) -> int:
        """Exact size of an encrypted sum of this plan in bytes."""
        ...

    def decrypt(self, encrypted_sum: bytes, manifest: PlanManifest, contributions: int) -> Int64Vector:
        """The exact sum, int64[vector_length].

        Raises: FedmeshError(CIPHERTEXT_INVALID) when it is not a sum of this plan over so many contributions.
        """
        ...

    def digest(self, attempt: AttemptId, sum_sha256: str, total: Int64Vector) -> bytes:
        """32 bytes that bind attempt, encrypted sum and plaintext, and that the centre cannot compute."""
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
    """What the registry says about a job."""

    plan_id: str
    hospital_ids: tuple[str, ...]
    rounds: int


class Mesh(Protocol):
    """The calls of the centre. Every method raises FedmeshError; `patience_s` bounds the retries of retryable ones."""

    async def get_plan(self, plan_id: str, patience_s: float) -> bytes: ...

    async def get_job(self, job_id: str, patience_s: float) -> JobFacts: ...

    async def download_blob(self, sha256: str, patience_s: float) -> bytes: ...

    async def upload_blob(self, job_id: str, sha256: str, content: bytes, patience_s: float) -> None: ...

    async def upload(
        self, attempt: AttemptId, manifest: PlanManifest, sha256: str, ciphertext: bytes, patience_s: float
    ) -> None: ...

    async def download_sum(self, attempt: AttemptId, size_limit: int, patience_s: float) -> bytes: ...

    async def report_ready(self, attempt: AttemptId, base_version: int, patience_s: float) -> None: ...

    async def report_upload(self, attempt: AttemptId, sha256: str, size: int, patience_s: float) -> None: ...

    async def submit_digest(self, attempt: AttemptId, sum_sha256: str, digest: bytes, patience_s: float) -> None: ...

    async def submit_state(self, attempt: AttemptId, sha256: str, metrics_json: str, patience_s: float) -> None: ...

    async def attest(self, attempt: AttemptId, sha256: str, reason: str, patience_s: float) -> None: ...

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

    def release(self, job_id: str) -> bool:
        """Give a job's reservation back if nothing was ever charged; answers whether it did."""
        ...


@dataclass(frozen=True)
class AttemptRecord:
    """What the node remembers of an attempt: hashes in hex, empty until known."""

    ciphertext_sha256: str
    sum_sha256: str


class NodeState(Protocol):
    """The node's durable memory beside the ledger."""

    def cursor(self) -> str: ...

    def save_cursor(self, cursor: str) -> None: ...

    def save_ciphertext(self, attempt: AttemptId, content: bytes) -> None:
        """Keep an attempt's ciphertext, fsynced with its name and hash. Raises: FedmeshError(STORE_FULL)."""
        ...

    def ciphertext(self, attempt: AttemptId) -> bytes | None:
        """The very bytes that were saved; None when there are none, or when they were lost or damaged."""
        ...

    def record(self, attempt: AttemptId) -> AttemptRecord: ...

    def pin_sum(self, attempt: AttemptId, sum_sha256: str) -> None:
        """Bind an attempt to the one sum that may be decrypted in it. Raises: FedmeshError(WRONG_STATE) for another."""
        ...

    def save_blob(self, job_id: str, content: bytes) -> str:
        """Keep a model state of a job under its SHA-256, which is returned."""
        ...

    def blob(self, sha256: str) -> bytes | None: ...

    def adopt(self, job_id: str, version: int, sha256: str) -> None:
        """Remember a committed version; states that are neither it nor the one before are deleted."""
        ...

    def finish_before(self, attempt: AttemptId, *, inclusive: bool) -> None:
        """Delete the ciphertexts of a job's attempts before (or up to) `attempt`; its hashes stay."""
        ...

    def finish_job(self, job_id: str) -> None:
        """Delete a job's ciphertexts; the committed states stay."""
        ...
