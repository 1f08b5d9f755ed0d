"""What to do next with an attempt: a pure function of what is known.

The quorum of every phase is t = threshold(n) of the whole cohort. A phase ends when nobody is waited for any more: all
have answered, or those who have not are gone, or the deadline has passed. It ends well with t answers, else the attempt
is given up.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from services.coordinator.domain.attempt import Attempt, Kind, Phase, Reports, Surroundings
from services.secure_sum.cohort import threshold

REASON_LENGTH: Final = 500


@dataclass(frozen=True)
class Rules:
    """Limits of a job.

    extra_attempts: repeated attempts that the plan's noise is calibrated for; None without privacy.
    """

    ready_ms: int
    phase_ms: int
    absence_grace_ms: int
    answer_grace_ms: int
    max_attempts: int
    extra_attempts: int | None


@dataclass(frozen=True)
class Wait:
    until_ms: int


@dataclass(frozen=True)
class Seal:
    group: tuple[str, ...]


@dataclass(frozen=True)
class OpenSum:
    """The group is sealed: open its sum, then ask for uploads."""


@dataclass(frozen=True)
class CloseSum:
    """Fix the sum, then ask for digests."""


@dataclass(frozen=True)
class Finalize:
    agreeing: tuple[str, ...]
    dissenting: tuple[str, ...]
    finalizer: str


@dataclass(frozen=True)
class Attest:
    state_sha256: str
    metrics_json: str


@dataclass(frozen=True)
class Commit:
    attesting: tuple[str, ...]


@dataclass(frozen=True)
class Abort:
    """Give the attempt up; with `fatal` the job too."""

    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class Reopen:
    """The attempt is over: open the next one, of this round or of the next."""


@dataclass(frozen=True)
class EndJob:
    reason: str


Decision = Wait | Seal | OpenSum | CloseSum | Finalize | Attest | Commit | Abort | Reopen | EndJob


def decide(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    """The next step. Repeating it with the same knowledge gives the same answer, on every replica."""
    if attempt.phase is Phase.COMMITTED:
        return Reopen()
    if attempt.phase is Phase.ABORTED:
        return _after_abort(attempt, rules)
    left = len(attempt.cohort) - len(set(attempt.cohort) & set(around.declined))
    needed = threshold(len(attempt.cohort))
    if left < needed:
        return Abort(_declined_reason(attempt, around, needed), fatal=True)
    return _STEPS[attempt.phase](attempt, reports, around, rules)


def finalizer_order(attempt: Attempt, agreeing: Collection[str]) -> list[str]:
    """The agreeing hospitals in the order in which they are asked to finalize: another one first in every attempt."""

    def rank(hospital_id: str) -> bytes:
        return hashlib.sha256("/".join(map(str, (*attempt.id, hospital_id))).encode()).digest()

    return sorted(agreeing, key=rank)


def quorum(attempt: Attempt) -> int:
    """The number of reports of the present phase that make it worth deciding anew."""
    if attempt.phase is Phase.FINALIZE:
        return 1
    needed = threshold(len(attempt.cohort))
    # The finalizer agrees with itself.
    return max(1, needed - 1) if attempt.phase is Phase.ATTEST else needed


def _training(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    if attempt.group:
        return OpenSum()
    ready = set(attempt.cohort) & reports.ready
    waiting = _Waiting(attempt, ready, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    if len(ready) < waiting.needed:
        return Abort(_shortfall(attempt, ready, around, waiting.needed, "were ready to send their part"))
    # Who has left meanwhile would only hold up the others, as long as these are enough.
    present = {name for name in ready if around.absent_ms.get(name, 0) < rules.absence_grace_ms}
    return Seal(tuple(sorted(present if len(present) >= waiting.needed else ready)))


def _upload(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    sent = set(attempt.group) & set(reports.uploads)
    waiting = _Waiting(attempt, sent, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    if len(sent) < waiting.needed:
        return Abort(_shortfall(attempt, sent, around, waiting.needed, "sent their part"))
    return CloseSum()


def _agree(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    digests = {name: digest for name, digest in reports.digests.items() if name in attempt.contributors}
    counts = Counter(digests.values())
    most = min(counts, key=lambda digest: (-counts[digest], digest), default="")
    waiting = _Waiting(attempt, set(digests), around, rules, counts[most], reports.reached_ms.get(Kind.DIGEST))
    if not waiting.over():
        return Wait(waiting.until())
    if counts[most] < waiting.needed:
        if len(counts) > 1:
            seen = ", ".join(str(count) for count in sorted(counts.values(), reverse=True))
            return Abort(
                f"hospitals decrypted different sums (groups of {seen}; {waiting.needed} equal ones are needed)"
            )
        return Abort(_shortfall(attempt, set(digests), around, waiting.needed, "decrypted the sum"))
    agreeing = tuple(sorted(name for name, digest in digests.items() if digest == most))
    dissenting = tuple(sorted(set(digests) - set(agreeing)))
    return Finalize(agreeing, dissenting, _next_finalizer(attempt, agreeing, around, rules))


def _finalize(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    state = reports.states.get(attempt.finalizer)
    if state is not None:
        return Attest(state.sha256, state.metrics_json)
    waiting = _Waiting(attempt, set(), around, rules, enough=0)
    if not waiting.over():
        return Wait(waiting.until())
    finalizer = _next_finalizer(attempt, attempt.agreeing, around, rules)
    if not finalizer:
        return Abort("no hospital computed the next state in time")
    return Finalize(attempt.agreeing, attempt.dissenting, finalizer)


def _attest(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    verdicts = {name: verdict for name, verdict in reports.verdicts.items() if name in attempt.agreeing}
    disputes = [f"{name}: {verdict.reason}" for name, verdict in sorted(verdicts.items()) if not verdict.agrees]
    if disputes:
        text = f"the state that {attempt.finalizer} computed is disputed by {'; '.join(disputes)}"
        return Abort(text[:REASON_LENGTH], fatal=True)
    attesting = {attempt.finalizer, *verdicts}
    waiting = _Waiting(
        attempt, set(verdicts), around, rules, len(attesting), reports.reached_ms.get(Kind.VERDICT, attempt.phase_ms)
    )
    if not waiting.over():
        return Wait(waiting.until())
    if len(attesting) < waiting.needed:
        return Abort(_shortfall(attempt, attesting, around, waiting.needed, "checked the next state"))
    return Commit(tuple(sorted(attesting)))


_STEPS: Final[dict[Phase, Callable[[Attempt, Reports, Surroundings, Rules], Decision]]] = {
    Phase.TRAINING: _training,
    Phase.UPLOAD: _upload,
    Phase.AGREE: _agree,
    Phase.FINALIZE: _finalize,
    Phase.ATTEST: _attest,
}


class _Waiting:
    """Whether anybody is still worth waiting for.

    enough: what counts towards the quorum, by default the number of answers. reached_ms: when a quorum had answered;
    late answers are then waited for only a little, where None means until the deadline.
    """

    def __init__(
        self,
        attempt: Attempt,
        answered: set[str],
        around: Surroundings,
        rules: Rules,
        enough: int | None = None,
        reached_ms: int | None = None,
    ) -> None:
        self.needed = threshold(len(attempt.cohort))
        self._now = around.now_ms
        self._quorum = (len(answered) if enough is None else enough) >= self.needed
        pending = set(attempt.members) - answered - set(around.declined)
        absences = [around.absent_ms.get(name) for name in sorted(pending)]
        self._nobody = not pending
        self._alone = attempt.phase is Phase.FINALIZE
        # When the last of those who have not answered has been gone for long enough; never while one is connected.
        self._gone_at = max(
            (
                attempt.deadline_ms if absent is None else self._now - absent + rules.absence_grace_ms
                for absent in absences
            ),
            default=attempt.deadline_ms,
        )
        self._deadline = attempt.deadline_ms
        self._late = attempt.deadline_ms
        if reached_ms is not None and self._quorum:
            self._late = reached_ms + rules.answer_grace_ms

    def until(self) -> int:
        """The next moment at which time alone changes the answer."""
        ends = self._gone_at if self._quorum or self._alone else self._deadline
        return min(ends, self._deadline, self._late)

    def over(self) -> bool:
        return self._nobody or self._now >= self.until()


def _next_finalizer(attempt: Attempt, agreeing: Collection[str], around: Surroundings, rules: Rules) -> str:
    order = [
        name for name in finalizer_order(attempt, agreeing) if name not in attempt.tried and name not in around.declined
    ]
    present = [name for name in order if around.absent_ms.get(name, 0) < rules.absence_grace_ms]
    return next(iter(present or order), "")


def _after_abort(attempt: Attempt, rules: Rules) -> Decision:
    if attempt.fatal:
        return EndJob(attempt.reason)
    if attempt.failures + 1 >= rules.max_attempts:
        text = f"round {attempt.round} failed {attempt.failures + 1} times, the last time because {attempt.reason}"
        return EndJob(text[:REASON_LENGTH])
    if rules.extra_attempts is not None and attempt.spent > rules.extra_attempts:
        text = (
            f"the plan's privacy allows {rules.extra_attempts} repeated attempts and they are used up, the last one "
            f"because {attempt.reason}"
        )
        return EndJob(text[:REASON_LENGTH])
    return Reopen()


def _shortfall(attempt: Attempt, done: Collection[str], around: Surroundings, needed: int, what: str) -> str:
    missing = sorted(set(attempt.members) - set(done))
    names = ", ".join(f"{name} (gone)" if name in around.absent_ms else name for name in missing)
    text = f"only {len(done)} of {len(attempt.cohort)} hospitals {what}, {needed} are needed; missing: {names}"
    return text[:REASON_LENGTH]


def _declined_reason(attempt: Attempt, around: Surroundings, needed: int) -> str:
    reasons = "; ".join(
        f"{name}: {declined.reason} [{declined.code}]"
        for name, declined in sorted(around.declined.items())
        if name in attempt.cohort
    )
    text = f"too few hospitals are left, {needed} of {len(attempt.cohort)} are needed. Declined: {reasons}"
    return text[:REASON_LENGTH]
