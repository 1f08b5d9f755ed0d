"""What the coordinator needs from a store. `services.coordinator.store` implements it on Redis."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from services.coordinator.domain.attempt import Attempt, AttemptId, Decline, Reports
from services.secure_sum.statements import Signed


class WakeUp(NamedTuple):
    """Hospitals that have new tasks, or jobs to look at."""

    kind: Literal["tasks", "job"]
    names: Sequence[str]


@dataclass(frozen=True)
class Observation:
    """A job's attempt as of one moment; `version` counts its changes, 0 when there is none. waiting: why none opens."""

    version: int = 0
    attempt: Attempt | None = None
    reports: Reports = field(default_factory=Reports)
    declined: Mapping[str, Decline] = field(default_factory=dict)
    connected: frozenset[str] = frozenset()
    waiting: str = ""


@dataclass(frozen=True)
class Report:
    """A hospital's report; `value` as by `domain.stored.report_value`. `guard` is what it must name, or empty.

    statements: what comes with it, by field. marks: what no other hospital may use in the attempt.
    """

    attempt: AttemptId
    kind: str
    hospital_id: str
    value: str
    guard: str = ""
    urgent: bool = False
    statements: Mapping[str, bytes] = field(default_factory=dict)
    marks: Sequence[str] = ()


class Rounds(Protocol):
    """Jobs' present attempts, their leases, and the hospitals' task streams; each method is one atomic transition.

    All methods raise FedmeshError(STORE_UNAVAILABLE | STORE_FULL) while the store is away or full.
    """

    # ---- driving

    async def acquire(self, job_id: str) -> str | None:
        """Take the lease of a job; the owner's mark, or None while another has it."""
        ...

    async def renew(self, job_id: str, owner: str) -> bool:
        """Prolong a lease; False when it was lost."""
        ...

    async def release(self, job_id: str, owner: str) -> None:
        """Give a lease up."""
        ...

    async def observe(self, job_id: str, owner: str = "") -> Observation | None:
        """Look at a job; with an owner also prolong its lease, and None when that was lost."""
        ...

    async def advance(
        self,
        owner: str,
        version: int,
        attempt: Attempt,
        tasks: Sequence[tuple[str, bytes]],
        *,
        fresh: bool = False,
        statements: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Store an attempt and hand out tasks (hospital, task); False when the lease or the version is not as given.

        fresh: this is another attempt than the one before, whose reports and statements are dropped. statements: to be
        kept with it, by field.
        """
        ...

    async def note(self, job_id: str, owner: str, reason: str) -> None:
        """Note why the job does not go on; shown until the next attempt opens."""
        ...

    async def attempt(self, job_id: str) -> Attempt | None:
        """The attempt alone, without what was reported in it."""
        ...

    async def statements(self, job_id: str, fields: Sequence[tuple[str, str]]) -> list[Signed | None]:
        """Statements by field and signer; None for what is not there."""
        ...

    async def unfinished_jobs(self) -> set[str]:
        """Jobs whose end the hospitals have not been told."""
        ...

    async def forget_job(self, job_id: str) -> None:
        """The hospitals were told of the job's end."""
        ...

    # ---- hospitals

    async def report(self, report: Report, now_ms: int, per_second: float, burst: int) -> list[str]:
        """Take a report, within a hospital's limit: so many in the long run, `burst` at once.

        "ok" and the attempt's phase, 0 without an attempt; or why it was not taken: "limited", "stranger", "copied",
        "gone", "stale" and the present round and attempt, "differs", "declined", or "phase", "outside" and "other" with
        the phase.
        """
        ...

    async def watch(self, hospital_id: str, cursor: str) -> tuple[str, list[bytes]]:
        """Where a stream begins: the cursor to read on from, and tasks to send first."""
        ...

    async def read_tasks(self, cursors: Mapping[str, str]) -> dict[str, list[tuple[str, bytes]]]:
        """New tasks of some hospitals after their cursors: (cursor, task), oldest first."""
        ...

    def wake_ups(self) -> AsyncGenerator[WakeUp, None]:
        """What replicas tell each other, from now on. Some may be lost."""
        ...

    async def beat(self, ttl_ms: int, details: Mapping[str, str]) -> None:
        """Note that hospitals are connected."""
        ...

    async def leave(self, hospital_id: str, details: str) -> None:
        """Note that a hospital's stream has ended, unless a newer one stands in its place."""
        ...

    async def participants(self) -> dict[str, dict[str, Any]]:
        """Details of the connected hospitals, by hospital."""
        ...
