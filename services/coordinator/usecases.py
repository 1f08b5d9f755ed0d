"""What the coordinator does for its callers: one method for each RPC."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span
from services.coordinator.domain.attempt import AttemptId, Decline, Kind, Phase, State, Upload, Verdict
from services.coordinator.domain.events import Event, hospital_declined
from services.coordinator.hub import Delivery, Hub
from services.coordinator.store.codec import report_value
from services.coordinator.store.redis import Observation, RedisRounds, Report

_WAIT: Final = "wait for the next task"


class Events(Protocol):
    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable. Raises: FedmeshError."""
        ...


@dataclass(frozen=True)
class RateLimit:
    """Reports of one hospital: `per_second` in the long run, `burst` at once."""

    per_second: float
    burst: int


class CoordinatorUseCases:
    """consortium: the trust domain of the hospitals."""

    def __init__(
        self, store: RedisRounds, hub: Hub, events: Events, clock: Clock, *, consortium: str, rate: RateLimit
    ) -> None:
        self._store = store
        self._hub = hub
        self._events = events
        self._clock = clock
        self._consortium = consortium
        self._rate = rate

    def watch(self, hospital_id: str, cursor: str, fingerprint: str) -> AsyncIterator[Delivery]:
        """The hospital's tasks; see `Hub.watch`."""
        return self._hub.watch(hospital_id, cursor, fingerprint)

    async def ready(self, hospital_id: str, attempt: AttemptId, base_version: int) -> Phase:
        """Raises: as `_report`."""
        version = str(base_version)
        return await self._report(Report(attempt, Kind.READY, hospital_id, version, guard=version))

    async def uploaded(self, hospital_id: str, attempt: AttemptId, upload: Upload) -> Phase:
        """Raises: as `_report`."""
        return await self._report(Report(attempt, Kind.UPLOAD, hospital_id, report_value(upload)))

    async def digest(self, hospital_id: str, attempt: AttemptId, sum_sha256: str, digest: bytes) -> Phase:
        """Raises: as `_report`; (INVALID_ARGUMENT) for a digest that is not 32 bytes."""
        if len(digest) != 32:
            raise FedmeshError(Code.INVALID_ARGUMENT, "digest must be 32 bytes", field="digest")
        return await self._report(Report(attempt, Kind.DIGEST, hospital_id, digest.hex(), guard=sum_sha256))

    async def state(self, hospital_id: str, attempt: AttemptId, state: State) -> Phase:
        """Raises: as `_report`."""
        return await self._report(Report(attempt, Kind.STATE, hospital_id, report_value(state)))

    async def attest(self, hospital_id: str, attempt: AttemptId, state_sha256: str, verdict: Verdict) -> Phase:
        """Raises: as `_report`."""
        return await self._report(
            Report(
                attempt,
                Kind.VERDICT,
                hospital_id,
                report_value(verdict),
                guard=state_sha256,
                urgent=not verdict.agrees,
            )
        )

    async def decline(self, hospital_id: str, job_id: str, decline: Decline) -> None:
        """A hospital leaves a job; its event is durable before this returns.

        Raises: as `_report`.
        """
        await self._report(Report(AttemptId(job_id, 0, 0), "declined", hospital_id, report_value(decline)))
        told = hospital_declined(job_id, self._consortium, hospital_id, decline, self._clock.now())
        await self._events.record([told])

    async def _report(self, report: Report) -> Phase:
        """Take a report; the attempt's phase. The same report again is answered again.

        Raises: FedmeshError(RATE_LIMITED); (PERMISSION_DENIED) for a hospital outside the cohort; (WRONG_STATE) for an
            attempt or a phase that is over, or when the hospital reported something else before.
        """
        now_ms = int(self._clock.now().timestamp() * 1000)
        with attempt_span(f"coordinator.report.{report.kind}", *report.attempt):
            result, *rest = await self._store.report(report, now_ms, self._rate.per_second, self._rate.burst)
        if result != "ok":
            raise _refusal(report, result, rest)
        return Phase(int(rest[0]))

    async def round(self, job_id: str, hospital_id: str | None) -> Observation:
        """A job's present attempt. hospital_id: the asking hospital, None for an operator.

        Raises: FedmeshError(NOT_FOUND), also for a hospital outside the cohort.
        """
        seen = await self._store.observe(job_id)
        cohort = seen.attempt.cohort if seen is not None and seen.attempt is not None else ()
        if seen is None or not cohort or (hospital_id is not None and hospital_id not in cohort):
            raise FedmeshError(Code.NOT_FOUND, f"no round of job {job_id} is known here: it has not begun, or is over")
        return seen

    async def participants(self) -> dict[str, dict[str, Any]]:
        """The connected hospitals: `since_ms` and `fingerprint` of each."""
        return await self._store.participants()


def _refusal(report: Report, result: str, rest: Sequence[str]) -> FedmeshError:
    if result == "limited":
        return FedmeshError(Code.RATE_LIMITED, "too many reports: slow down and send this one again")
    if result == "stranger":
        return FedmeshError(Code.PERMISSION_DENIED, f"hospital {report.hospital_id} is not in this job's cohort")
    phase = Phase(int(rest[0])).name if len(rest) == 1 else ""
    texts = {
        "gone": f"no attempt of this job is open: {_WAIT}",
        "stale": f"this attempt is not the present one, which is {'.'.join(rest)} (round.attempt): {_WAIT}",
        "differs": "the hospital reported something else before: a report stands",
        "declined": "the hospital has declined this job",
        "phase": f"the attempt is in phase {phase}, which takes no such report: {_WAIT}",
        "outside": f"the attempt's phase {phase} does not ask this hospital: {_WAIT}",
        "other": f"the report names another version, sum or state than phase {phase} is about: {_WAIT}",
    }
    return FedmeshError(Code.WRONG_STATE, texts[result], kind=report.kind)
