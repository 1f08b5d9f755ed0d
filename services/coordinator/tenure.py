"""What a replica works with while it holds a job's lease."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from services.common.clock import Clock
from services.common.errors import FedmeshError
from services.common.tasks import end_tasks
from services.common.telemetry import exemplar, get_logger
from services.common.tracing import trace_attempt, trace_round
from services.coordinator import metrics
from services.coordinator.domain.attempt import GONE_MS, OVER, Attempt, AttemptId, Phase, Surroundings
from services.coordinator.domain.events import attempt_events
from services.coordinator.domain.machine import Rules
from services.coordinator.outward import Aggregator, Job, Registry
from services.coordinator.ports import Observation, Rounds
from services.coordinator.rosters import Rosters
from services.coordinator.shelf import Shelf
from services.coordinator.tasks import NO_PAPERS, Papers, phase_tasks
from services.plans.manifest import PlanManifest

log = get_logger(__name__)

# How attempts and rounds end, in metrics and traces.
COMMITTED: Final = "committed"
BURNT: Final = "burnt"
ABORTED: Final = "aborted"

# Longer than hospitals pause between two tries of a call.
_MORE_MS: Final = 5_000

Barred = Callable[[str], bool]
"""Whether a hospital is suspended."""


class OutdatedError(Exception):
    """The record is not any more what the step was decided on, or the lease is lost: look again."""


@dataclass(frozen=True)
class Settings:
    """actor: the coordinator's SPIFFE id. lease_s, absence_grace_s and so on: see config."""

    actor: str
    lease_s: float
    absence_grace_s: float
    answer_grace_s: float
    max_attempts: int


@dataclass(frozen=True)
class Parts:
    """What all jobs of a replica share."""

    store: Rounds
    registry: Registry
    aggregator: Aggregator
    rosters: Rosters
    clock: Clock
    settings: Settings
    barred: Barred


@dataclass
class Tenure:
    """One lease of one job. job, manifest: as far as they are known; None makes the runner ask. hindered: the last step
    failed because a service or store was away.
    """

    job_id: str
    owner: str
    parts: Parts
    job: Job | None = None
    manifest: PlanManifest | None = None
    over: bool = False
    hindered: bool = False
    details: tuple[AttemptId, bytes] | None = None
    _recorded: set[str] = field(default_factory=set)
    _recording: asyncio.Lock = field(default_factory=asyncio.Lock)
    _missing_since: dict[str, float] = field(default_factory=dict)
    _side: set["asyncio.Task[None]"] = field(default_factory=set)
    _began_ms: dict[AttemptId, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shelf = Shelf(self.parts.store)

    async def move(
        self,
        seen: Observation,
        attempt: Attempt,
        papers: Papers = NO_PAPERS,
        *,
        fresh: bool = False,
        statements: Mapping[str, bytes] | None = None,
    ) -> None:
        """Store the attempt's next state and hand out its tasks.

        Raises: OutdatedError when another replica was faster.
        """
        tasks = phase_tasks(attempt, papers)
        moved = await self.parts.store.advance(
            self.owner, seen.version, attempt, tasks, fresh=fresh, statements=statements
        )
        if not moved:
            raise OutdatedError
        before = seen.attempt
        if before is not None and before.phase not in (*OVER, attempt.phase):
            spent_s = (self.now_ms() - before.phase_ms) / 1000
            metrics.PHASE_SECONDS.labels(before.phase.name.lower()).observe(spent_s, exemplar())
        if attempt.phase is Phase.TRAINING:
            self._began_ms.setdefault(attempt.id, attempt.phase_ms)

    async def prolong(self, case: "Case") -> None:
        """Give the hospitals some more time for what they are doing; their tasks stay as they are.

        Raises: OutdatedError when another replica was faster.
        """
        more = replace(case.attempt, deadline_ms=self.now_ms() + _MORE_MS)
        if not await self.parts.store.advance(self.owner, case.seen.version, more, []):
            raise OutdatedError
        log.info("attempt_prolonged", **case.facts)

    def note_end(self, attempt: Attempt, outcome: str) -> None:
        """Count an attempt that has ended, and write its span."""
        metrics.ATTEMPTS.labels(outcome).inc(exemplar=exemplar())
        trace_attempt(*attempt.id, outcome, self._began_ns(attempt, [attempt.id]))
        if outcome != ABORTED:
            self.note_round_end(attempt, outcome)

    def note_round_end(self, attempt: Attempt, outcome: str) -> None:
        """Write the span of the attempt's round, which nobody tries again."""
        tried = [known for known in self._began_ms if known.round == attempt.round]
        trace_round(attempt.job_id, attempt.round, outcome, self._began_ns(attempt, tried))

    def _began_ns(self, attempt: Attempt, tried: Iterable[AttemptId]) -> int:
        # Of an attempt that another replica opened, what is known began with its group.
        known = [self._began_ms[each] for each in tried if each in self._began_ms]
        return min([*known, attempt.sealed_ms or attempt.phase_ms]) * 1_000_000

    async def record(self, attempt: Attempt) -> None:
        """Make the attempt's events durable, as far as this replica has not seen to it already."""
        async with self._recording:
            told = attempt_events(attempt, self.parts.settings.actor)
            events = [item for item in told if item.event_id not in self._recorded]
            if events:
                await self.parts.registry.record(events)
                self._recorded.update(item.event_id for item in events)

    def record_aside(self, attempt: Attempt) -> None:
        """Report what has happened while hospitals work; `record` makes up for what fails here."""
        self.aside(self.record(attempt))

    def discard_aside(self, attempt: AttemptId) -> None:
        """Throw the attempt's sum away."""
        self.aside(self.parts.aggregator.discard(attempt))

    def strike_aside(self, attempt: AttemptId, error: FedmeshError, what: str) -> None:
        """Report the hospital that an error names as its culprit, if it names one."""
        culprit = error.detail.get("culprit")
        if culprit is not None:
            log.warning("hospital_struck", job_id=self.job_id, hospital_id=culprit, reason=error.message)
            self.aside(self.parts.registry.strike(attempt, culprit, error, what))

    def aside(self, work: Awaitable[Any]) -> None:
        task = asyncio.create_task(_quietly(work))
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    async def end(self) -> None:
        """Wait for what runs aside when the job is over, else stop it: the next owner repeats it."""
        if self.over:
            await asyncio.gather(*self._side, return_exceptions=True)
        await end_tasks(self._side)

    def rules(self, manifest: PlanManifest) -> Rules:
        settings = self.parts.settings
        return Rules(
            ready_ms=int(manifest.rounds.ready_deadline_s * 1000),
            phase_ms=int(manifest.rounds.phase_deadline_s * 1000),
            absence_grace_ms=int(settings.absence_grace_s * 1000),
            answer_grace_ms=int(settings.answer_grace_s * 1000),
            max_attempts=settings.max_attempts,
            extra_attempts=manifest.privacy.extra_attempts if manifest.privacy is not None else None,
        )

    def surroundings(self, seen: Observation) -> Surroundings:
        cohort = seen.attempt.cohort if seen.attempt is not None else ()
        now = time.monotonic()
        missing = set(cohort) - seen.connected
        self._missing_since = {name: self._missing_since.get(name, now) for name in missing}
        absent = {name: int((now - since) * 1000) for name, since in self._missing_since.items()}
        absent |= {name: GONE_MS for name in cohort if self.parts.barred(name)}
        return Surroundings(self.now_ms(), absent, seen.declined)

    def now_ms(self) -> int:
        return int(self.parts.clock.now().timestamp() * 1000)


@dataclass(frozen=True)
class Case:
    """One look at an attempt under a lease, and what a decision about it needs."""

    tenure: Tenure
    seen: Observation
    attempt: Attempt
    manifest: PlanManifest
    rules: Rules
    around: Surroundings

    @property
    def facts(self) -> dict[str, object]:
        """What every log line about the attempt says."""
        return {"job_id": self.attempt.job_id, "round": self.attempt.round, "attempt": self.attempt.attempt}

    def phase_ends_ms(self) -> int:
        return self.tenure.now_ms() + self.rules.phase_ms


async def _quietly(work: Awaitable[Any]) -> None:
    try:
        await work
    except FedmeshError as error:
        log.info("work_aside_failed", reason=error.message, code=error.code.value)
