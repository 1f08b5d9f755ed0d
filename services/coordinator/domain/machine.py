"""What to do next with an attempt: a pure function of what is known.

The quorum of every phase is t, the threshold of the roster. A phase in which everybody counts ends when nobody is
waited for any more: all have answered, or those who have not are gone, or the deadline has passed. CONFIRM, UNMASK and
AGREE end as soon as t have answered well; in asynchronous rounds TRAINING ends as soon as K >= t are ready. Before the
survivors are stored a shortfall aborts the attempt; afterwards it burns the version.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from services.coordinator.domain.attempt import Agreement, Attempt, Kind, Phase, Reports, Seen, Surroundings

REASON_LENGTH: Final = 500
MAX_RETURNS: Final = 3
"""How often survivors are asked for the same uploads again after a sum was lost."""


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
    """Fix the group and ask it for shares."""

    group: tuple[str, ...]


@dataclass(frozen=True)
class FixSharers:
    sharers: tuple[str, ...]


@dataclass(frozen=True)
class OpenSum:
    """The sharers are fixed: open their sum, then ask for uploads."""


@dataclass(frozen=True)
class CloseSum:
    """End the uploads: who was counted survives, and confirms it. Survivors that returned go on to UNMASK."""


@dataclass(frozen=True)
class StoreSurvivors:
    """Store the list with these signatures, then ask for reveals."""

    confirming: tuple[str, ...]


@dataclass(frozen=True)
class OpenMasks:
    """Open the masks with these reveals, compute the sum, then ask for digests."""

    revealing: tuple[str, ...]


@dataclass(frozen=True)
class Finalize:
    """Name a hospital that stores the next state."""

    agreement: Agreement
    finalizer: str


@dataclass(frozen=True)
class Attest:
    """Let the others check the finalizer's state."""

    agreement: Agreement
    state_sha256: str
    metrics_json: str


@dataclass(frozen=True)
class Commit:
    agreement: Agreement
    state_sha256: str
    metrics_json: str
    attesting: tuple[str, ...]


@dataclass(frozen=True)
class Abort:
    """Give the attempt up; with `fatal` the job too."""

    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class Burn:
    """Use the version up without a new state."""

    reason: str


@dataclass(frozen=True)
class Reopen:
    """The attempt is over: open the next one, of this round or of the next."""


class Cause(StrEnum):
    """Why a job fails. disputed: hospitals computed another next state than the one that was stored. declined: too few
    hospitals take the plan. attempts: one of its rounds failed too often. plan: the coordinator cannot use the plan.
    """

    DISPUTED = "disputed"
    DECLINED = "declined"
    ATTEMPTS = "attempts"
    PLAN = "plan"


@dataclass(frozen=True)
class EndJob:
    reason: str
    cause: Cause


Decision = (
    Wait
    | Seal
    | FixSharers
    | OpenSum
    | CloseSum
    | StoreSurvivors
    | OpenMasks
    | Finalize
    | Attest
    | Commit
    | Abort
    | Burn
    | Reopen
    | EndJob
)


def decide(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    """The next step. Repeating it with the same knowledge gives the same answer, on every replica."""
    if attempt.phase in (Phase.COMMITTED, Phase.BURNT):
        return Reopen()
    if attempt.phase is Phase.ABORTED:
        return _after_abort(attempt, rules)
    decision = _STEPS[attempt.phase](attempt, reports, around, rules)
    # Once enough have confirmed, the list may be stored already: refusals that come now change nothing.
    if not attempt.bound and not isinstance(decision, StoreSurvivors):
        left = set(attempt.cohort) - set(around.declined)
        if len(left) < attempt.needed:
            return Abort(_declined_reason(attempt, around), fatal=True)
    return decision


def gives_up(decision: Decision) -> bool:
    """Whether a decision ends an attempt that more time might complete."""
    return isinstance(decision, Burn) or (isinstance(decision, Abort) and not decision.fatal)


def finalizer_order(attempt: Attempt, hospital_ids: Iterable[str]) -> list[str]:
    """Hospitals in the order in which they are asked to finalize: another one first in every attempt."""

    def rank(hospital_id: str) -> bytes:
        return hashlib.sha256("/".join(map(str, (*attempt.id, hospital_id))).encode()).digest()

    return sorted(hospital_ids, key=rank)


def first_finalizer(attempt: Attempt, around: Surroundings, rules: Rules) -> str:
    """The survivor that is expected to store the next state before it sends its digest."""
    return _next_finalizer(attempt, attempt.survivor_ids, around, rules) or attempt.survivor_ids[0]


def quorum(attempt: Attempt) -> int:
    """The number of reports of the present phase that make it worth deciding anew."""
    if attempt.phase is Phase.FINALIZE:
        return 1
    if attempt.phase is Phase.UPLOAD and attempt.bound:
        return len(attempt.members)
    if attempt.phase is Phase.TRAINING:
        return min(max(attempt.enough, attempt.needed), len(attempt.cohort))
    # The finalizer agrees with itself.
    return max(1, attempt.needed - 1) if attempt.phase is Phase.ATTEST else attempt.needed


def after_refusal(attempt: Attempt, around: Surroundings, rules: Rules, reason: str) -> Finalize | Burn:
    """The registry refused the version: the finalizer did not store what it said. Name another, if one is left."""
    agreement = attempt.agreement
    finalizer = _next_finalizer(attempt, agreement.stating or agreement.agreeing, around, rules)
    return Finalize(agreement, finalizer) if finalizer else Burn(reason[:REASON_LENGTH])


def _training(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    ready = set(attempt.cohort) & reports.ready
    if attempt.enough:
        # Asynchronous: whoever is not ready yet goes into a later group.
        there = tuple(sorted(_there(ready, around, rules)))
        if len(there) >= max(attempt.enough, attempt.needed):
            return Seal(there)
    waiting = _Waiting(attempt, ready, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    if len(ready) < attempt.needed:
        return Abort(_shortfall(attempt, ready, around, "were ready to send their part"))
    return Seal(_present(attempt, ready, around, rules))


def _share(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    if attempt.sharers:
        return OpenSum()
    shared = set(attempt.group) & reports.shares
    waiting = _Waiting(attempt, shared, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    if len(shared) < attempt.needed:
        return Abort(_shortfall(attempt, shared, around, "shared their mask secrets"))
    return FixSharers(_present(attempt, shared, around, rules))


def _upload(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    sent = set(attempt.members) & set(reports.uploads)
    if attempt.bound:
        # The sum is fixed by the stored list: all of them, or none.
        if len(sent) == len(attempt.members):
            return CloseSum()
        if around.now_ms < attempt.deadline_ms:
            return Wait(attempt.deadline_ms)
        return Burn(_shortfall(attempt, sent, around, "sent their part again", needed=len(attempt.members)))
    waiting = _Waiting(attempt, sent, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    if len(sent) < attempt.needed:
        return Abort(_shortfall(attempt, sent, around, "sent their part"))
    return CloseSum()


def _confirm(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    confirming = set(attempt.members) & reports.confirmations
    if len(confirming) >= attempt.needed:
        return StoreSurvivors(tuple(sorted(confirming)))
    waiting = _Waiting(attempt, confirming, around, rules)
    if not waiting.over():
        return Wait(waiting.until())
    return Abort(_shortfall(attempt, confirming, around, "confirmed the list of survivors"))


def _unmask(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    revealing = set(attempt.members) & reports.reveals
    if len(revealing) >= attempt.needed and len(revealing) > attempt.unopened:
        return OpenMasks(tuple(sorted(revealing)))
    waiting = _Waiting(attempt, revealing, around, rules, enough=0)
    if not waiting.over():
        return Wait(waiting.until())
    if attempt.trouble:
        return Burn(f"the masks could not be opened: {attempt.trouble}"[:REASON_LENGTH])
    return Burn(_shortfall(attempt, revealing, around, "revealed what opens the masks"))


def agreement_on(attempt: Attempt, digests: Mapping[str, Seen]) -> Agreement:
    """The largest group of equal digests, and in it the largest group of equal states."""
    most = _most_common(seen.digest for seen in digests.values())
    agreeing = tuple(sorted(name for name, seen in digests.items() if seen.digest == most))
    state = _most_common(digests[name].next_state_sha256 for name in agreeing)
    stating = tuple(name for name in agreeing if digests[name].next_state_sha256 == state)
    agreement = Agreement(agreeing, tuple(sorted(set(digests) - set(agreeing))))
    return agreement if len(stating) < attempt.needed else replace(agreement, state_sha256=state, stating=stating)


def _most_common(values: Iterable[str]) -> str:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default="")


def _agree(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    digests = {name: seen for name, seen in reports.digests.items() if name in attempt.members}
    agreement = agreement_on(attempt, digests)
    stored = digests.get(attempt.finalizer)
    if stored is not None and attempt.finalizer in agreement.stating:
        return Commit(agreement, agreement.state_sha256, stored.metrics_json, agreement.stating)
    waiting = _Waiting(
        attempt, set(digests), around, rules, len(agreement.agreeing), reports.reached_ms.get(Kind.DIGEST)
    )
    # The expected finalizer has said something else: nobody's answer can make the state that it stored count.
    lost = stored is not None and bool(agreement.state_sha256)
    if not lost and not waiting.over():
        return Wait(waiting.until())
    if len(agreement.agreeing) < attempt.needed:
        counts = sorted(Counter(seen.digest for seen in digests.values()).values(), reverse=True)
        if len(counts) > 1:
            seen = ", ".join(map(str, counts))
            return Burn(
                f"hospitals decrypted different sums (groups of {seen}; {attempt.needed} equal ones are needed)"
            )
        return Burn(_shortfall(attempt, digests, around, "decrypted the sum"))
    if stored is not None and not agreement.state_sha256 and attempt.finalizer in agreement.agreeing:
        # States differ in their last bits: the one that is stored is as good as any.
        return Attest(agreement, stored.next_state_sha256, stored.metrics_json)
    return _name_finalizer(attempt, agreement, around, rules)


def _finalize(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    agreement = attempt.agreement
    state = reports.states.get(attempt.finalizer)
    if state is not None and state.sha256 == agreement.state_sha256:
        attesting = tuple(sorted({attempt.finalizer, *agreement.stating}))
        return Commit(agreement, state.sha256, state.metrics_json, attesting)
    if state is not None:
        return Attest(agreement, state.sha256, state.metrics_json)
    waiting = _Waiting(attempt, set(), around, rules, enough=0)
    if not waiting.over():
        return Wait(waiting.until())
    return _name_finalizer(attempt, agreement, around, rules)


def _attest(attempt: Attempt, reports: Reports, around: Surroundings, rules: Rules) -> Decision:
    agreement = attempt.agreement
    verdicts = {name: verdict for name, verdict in reports.verdicts.items() if name in agreement.agreeing}
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
    if len(attesting) < attempt.needed:
        return Burn(_shortfall(attempt, attesting, around, "checked the next state"))
    return Commit(agreement, attempt.next_state_sha256, attempt.metrics_json, tuple(sorted(attesting)))


_STEPS: Final[dict[Phase, Callable[[Attempt, Reports, Surroundings, Rules], Decision]]] = {
    Phase.TRAINING: _training,
    Phase.SHARE: _share,
    Phase.UPLOAD: _upload,
    Phase.CONFIRM: _confirm,
    Phase.UNMASK: _unmask,
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
        self._now = around.now_ms
        self._quorum = (len(answered) if enough is None else enough) >= attempt.needed
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


def _present(attempt: Attempt, answered: set[str], around: Surroundings, rules: Rules) -> tuple[str, ...]:
    """Who goes on: whoever has left meanwhile would only hold up the others, as long as these are enough."""
    present = _there(answered, around, rules)
    return tuple(sorted(present if len(present) >= attempt.needed else answered))


def _there(answered: set[str], around: Surroundings, rules: Rules) -> set[str]:
    return {name for name in answered if around.absent_ms.get(name, 0) < rules.absence_grace_ms}


def _name_finalizer(attempt: Attempt, agreement: Agreement, around: Surroundings, rules: Rules) -> Decision:
    finalizer = _next_finalizer(attempt, agreement.stating, around, rules) or _next_finalizer(
        attempt, agreement.agreeing, around, rules
    )
    if not finalizer:
        return Burn("no hospital stored the next state in time")
    return Finalize(agreement, finalizer)


def _next_finalizer(attempt: Attempt, hospital_ids: Collection[str], around: Surroundings, rules: Rules) -> str:
    order = [
        name
        for name in finalizer_order(attempt, hospital_ids)
        if name not in attempt.tried and name not in around.declined
    ]
    present = [name for name in order if around.absent_ms.get(name, 0) < rules.absence_grace_ms]
    return next(iter(present or order), "")


def _after_abort(attempt: Attempt, rules: Rules) -> Decision:
    if attempt.fatal:
        # Verdicts end a job in ATTEST only; by then nobody declines any more.
        return EndJob(attempt.reason, Cause.DISPUTED if attempt.ended_in is Phase.ATTEST else Cause.DECLINED)
    if attempt.failures + 1 >= rules.max_attempts:
        text = f"round {attempt.round} failed {attempt.failures + 1} times, the last time because {attempt.reason}"
        return EndJob(text[:REASON_LENGTH], Cause.ATTEMPTS)
    if rules.extra_attempts is not None and attempt.spent > rules.extra_attempts:
        text = (
            f"the plan's privacy allows {rules.extra_attempts} repeated attempts and they are used up, the last one "
            f"because {attempt.reason}"
        )
        return EndJob(text[:REASON_LENGTH], Cause.ATTEMPTS)
    return Reopen()


def _shortfall(
    attempt: Attempt, done: Collection[str], around: Surroundings, what: str, needed: int | None = None
) -> str:
    missing = sorted(set(attempt.members) - set(done))
    names = ", ".join(f"{name} (gone)" if name in around.absent_ms else name for name in missing)
    needed = attempt.needed if needed is None else needed
    text = f"only {len(done)} of {len(attempt.cohort)} hospitals {what}, {needed} are needed; missing: {names}"
    return text[:REASON_LENGTH]


def _declined_reason(attempt: Attempt, around: Surroundings) -> str:
    reasons = "; ".join(
        f"{name}: {declined.reason} [{declined.code}]"
        for name, declined in sorted(around.declined.items())
        if name in attempt.cohort
    )
    text = f"too few hospitals are left, {attempt.needed} of {attempt.roster_size} are needed. Declined: {reasons}"
    return text[:REASON_LENGTH]
