"""What the coordinator does for its callers: one method for each RPC."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span, get_logger
from services.coordinator import metrics
from services.coordinator.domain.attempt import AttemptId, Decline, Kind, Phase, Seen, State, Upload, Verdict
from services.coordinator.domain.events import Event, hospital_declined, report_refused
from services.coordinator.domain.stored import report_value
from services.coordinator.hub import Delivery, Hub
from services.coordinator.intake import UNJUDGED, Intake, Judged, shares_value
from services.coordinator.ports import Observation, Report, Rounds
from services.secure_sum.statements import Signed

log = get_logger(__name__)

_WAIT: Final = "wait for the next task"


class Wards(Protocol):
    """What the registry keeps: events, and how often a hospital has misbehaved."""

    async def record(self, events: Sequence[Event]) -> None:
        """Make events durable. Raises: FedmeshError."""
        ...

    async def strike(self, attempt: AttemptId, hospital_id: str, error: FedmeshError, what: str) -> None:
        """Note what no honest hospital does. Raises: FedmeshError."""
        ...


@dataclass(frozen=True)
class RateLimit:
    """Reports of one hospital: `per_second` in the long run, `burst` at once."""

    per_second: float
    burst: int


class Sender(NamedTuple):
    """Who reports in which attempt; method and request_id name the call."""

    hospital_id: str
    attempt: AttemptId
    method: str
    request_id: str


class CoordinatorUseCases:
    """consortium: the trust domain of the hospitals."""

    def __init__(
        self,
        store: Rounds,
        hub: Hub,
        intake: Intake,
        wards: Wards,
        clock: Clock,
        *,
        consortium: str,
        rate: RateLimit,
    ) -> None:
        self._store = store
        self._hub = hub
        self._intake = intake
        self._wards = wards
        self._clock = clock
        self._consortium = consortium
        self._rate = rate

    def watch(self, hospital_id: str, cursor: str, fingerprint: str) -> AsyncIterator[Delivery]:
        """The hospital's tasks; see `Hub.watch`."""
        return self._hub.watch(hospital_id, cursor, fingerprint)

    async def ready(self, sender: Sender, base_version: int, advert: Signed) -> Phase:
        """base_version: the one trained on, by the advert's age older than the attempt's. Raises: as `_report`."""
        judged = await self._judge(sender, self._intake.advert(sender.attempt, sender.hospital_id, advert))
        value = f"{base_version}:{shares_value([advert])}"
        # What the phase is about is the version that the attempt builds on.
        builds_on = base_version + (judged.age if judged is not None else 0)
        return await self._take(sender, Kind.READY, value, str(builds_on), judged)

    async def shares(self, sender: Sender, shares: Sequence[Signed]) -> Phase:
        """Raises: as `_report`."""
        judged = await self._judge(sender, self._intake.shares(sender.attempt, sender.hospital_id, shares))
        return await self._take(sender, Kind.SHARES, shares_value(shares), "", judged)

    async def uploaded(self, sender: Sender, upload: Upload, signed: Signed) -> Phase:
        """Raises: as `_report`."""
        judging = self._intake.upload(sender.attempt, sender.hospital_id, signed, upload.sha256)
        judged = await self._judge(sender, judging)
        return await self._take(sender, Kind.UPLOAD, report_value(upload), "", judged)

    async def confirm(self, sender: Sender, survivors_sha256: str, signature: bytes) -> Phase:
        """Raises: as `_report`."""
        judging = self._intake.confirmation(sender.attempt, sender.hospital_id, survivors_sha256, signature)
        judged = await self._judge(sender, judging)
        return await self._take(sender, Kind.CONFIRMATION, signature.hex(), survivors_sha256, judged)

    async def reveal(self, sender: Sender, reveal: Signed) -> Phase:
        """Raises: as `_report`."""
        judged = await self._judge(sender, self._intake.reveal(sender.attempt, sender.hospital_id, reveal))
        return await self._take(sender, Kind.REVEAL, shares_value([reveal]), "", judged)

    async def digest(self, sender: Sender, sum_sha256: str, seen: Seen, signed: Signed) -> Phase:
        """Raises: as `_report`."""
        judging = self._intake.digest(sender.attempt, sender.hospital_id, signed, sum_sha256, seen)
        judged = await self._judge(sender, judging)
        return await self._take(sender, Kind.DIGEST, report_value(seen), sum_sha256, judged)

    async def state(self, sender: Sender, state: State) -> Phase:
        """Raises: as `_report`."""
        return await self._report(Report(sender.attempt, Kind.STATE, sender.hospital_id, report_value(state)))

    async def attest(self, sender: Sender, state_sha256: str, verdict: Verdict) -> Phase:
        """Raises: as `_report`."""
        return await self._report(
            Report(
                sender.attempt,
                Kind.VERDICT,
                sender.hospital_id,
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
        await self._wards.record([told])

    async def _judge(self, sender: Sender, judging: Awaitable[Judged | None]) -> Judged | None:
        """Check what was sent. What no honest hospital sends is a strike, noted before the refusal is answered.

        Raises: FedmeshError(STATEMENT_INVALID); retryable ones while it cannot be checked or noted.
        """
        try:
            return await judging
        except FedmeshError as error:
            if error.code is Code.STATEMENT_INVALID:
                await self._strike(sender, error)
            raise

    async def _strike(self, sender: Sender, error: FedmeshError) -> None:
        hospital_id, attempt, method, request_id = sender
        # Nobody can make the centre write without limit.
        await self._report(Report(attempt, "refused", hospital_id, ""))
        log.warning("statement_refused", hospital_id=hospital_id, method=method, reason=error.message)
        metrics.REFUSED.labels(method).inc()
        told = report_refused(attempt, self._consortium, hospital_id, method, request_id, error, self._clock.now())
        await asyncio.gather(
            self._wards.record([told]), self._wards.strike(attempt, hospital_id, error, f"{method}/{request_id}")
        )

    async def _take(self, sender: Sender, kind: Kind, value: str, guard: str, judged: Judged | None) -> Phase:
        if judged is None:
            return await self._report(Report(sender.attempt, kind, sender.hospital_id, value, guard=UNJUDGED))
        report = Report(
            sender.attempt,
            kind,
            sender.hospital_id,
            value,
            guard=guard,
            statements=judged.statements,
            marks=judged.marks,
        )
        try:
            return await self._report(report)
        except FedmeshError as error:
            if error.code is Code.STATEMENT_INVALID:
                await self._strike(sender, error)
            raise

    async def _report(self, report: Report) -> Phase:
        """Take a report; the attempt's phase. The same report again is answered again.

        Raises: FedmeshError(RATE_LIMITED); (PERMISSION_DENIED) for a hospital outside the cohort;
            (WRONG_STATE) for an attempt or a phase that is over, or when the hospital reported something else before;
            (STATEMENT_INVALID) for an advert with another hospital's key.
        """
        now_ms = int(self._clock.now().timestamp() * 1000)
        with attempt_span(f"coordinator.report.{report.kind}", *report.attempt):
            result, *rest = await self._store.report(report, now_ms, self._rate.per_second, self._rate.burst)
        if result != "ok":
            raise _refusal(report, result, rest)
        return Phase(int(rest[0])) if rest[0] != "0" else Phase.TRAINING

    async def round(self, job_id: str, hospital_id: str | None) -> Observation:
        """A job's present attempt. hospital_id: the asking hospital, None for an operator.

        Raises: FedmeshError(NOT_FOUND), also for a hospital outside the cohort.
        """
        seen = await self._store.observe(job_id)
        cohort = seen.attempt.cohort if seen is not None and seen.attempt is not None else ()
        if seen is None or not cohort or (hospital_id is not None and hospital_id not in cohort):
            why = f": {seen.waiting}" if seen is not None and seen.waiting and hospital_id is None else ""
            raise FedmeshError(
                Code.NOT_FOUND, f"no round of job {job_id} is known here: it has not begun, or is over{why}"
            )
        return seen

    async def participants(self) -> dict[str, dict[str, Any]]:
        """The connected hospitals: `since_ms` and `fingerprint` of each."""
        return await self._store.participants()


def _refusal(report: Report, result: str, rest: Sequence[str]) -> FedmeshError:
    if result == "limited":
        return FedmeshError(Code.RATE_LIMITED, "too many reports: slow down and send this one again")
    if result == "stranger":
        return FedmeshError(Code.PERMISSION_DENIED, f"hospital {report.hospital_id} is not in this job's cohort")
    if result == "copied":
        return FedmeshError(Code.STATEMENT_INVALID, "the advert has a key that another hospital advertised before")
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
