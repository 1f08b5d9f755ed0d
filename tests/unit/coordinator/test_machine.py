"""The state machine alone: random histories of reports, absences, refusals and time."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.domain import machine
from services.coordinator.domain.attempt import (
    ACCEPTS,
    Attempt,
    Contribution,
    Decline,
    Kind,
    Phase,
    Reports,
    State,
    Surroundings,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import Rules, decide, finalizer_order
from services.coordinator.store.codec import parse_attempt, parse_reports, record_fields, report_value
from services.secure_sum.cohort import threshold

RULES = Rules(
    ready_ms=60_000, phase_ms=30_000, absence_grace_ms=3000, answer_grace_ms=2000, max_attempts=3, extra_attempts=None
)
SHA256 = "ab" * 32


def cohort(n: int) -> tuple[str, ...]:
    return tuple(f"h{number:02d}" for number in range(1, n + 1))


def training(n: int = 15, **changes: Any) -> Attempt:
    return replace(
        Attempt("job", 1, 1, SHA256, 0, "", cohort(n), Phase.TRAINING, phase_ms=0, deadline_ms=60_000), **changes
    )


def agreeing_state(n: int = 15) -> Attempt:
    names = cohort(n)
    contributions = tuple(Contribution(name, SHA256) for name in names)
    return training(n).sealed(names, 1).uploading(100, 2, 30_000).summed(contributions, SHA256, 3, 30_000)


def at(now_ms: int, absent: dict[str, int] | None = None, declined: tuple[str, ...] = ()) -> Surroundings:
    return Surroundings(now_ms, absent or {}, {name: Decline("data-invalid", "no") for name in declined})


# ---- single rules


def test_all_ready_seals_at_once() -> None:
    assert decide(training(), Reports(ready=frozenset(cohort(15))), at(1), RULES) == machine.Seal(cohort(15))


def test_a_connected_hospital_is_waited_for_until_the_deadline() -> None:
    reports = Reports(ready=frozenset(cohort(14)))
    assert decide(training(), reports, at(59_999), RULES) == machine.Wait(60_000)
    assert decide(training(), reports, at(60_000), RULES) == machine.Seal(cohort(14))


def test_a_missing_hospital_is_waited_for_only_a_little() -> None:
    reports = Reports(ready=frozenset(cohort(14)))
    assert decide(training(), reports, at(100, {"h15": 50}), RULES) == machine.Wait(100 + 2950)
    assert decide(training(), reports, at(100, {"h15": 3000}), RULES) == machine.Seal(cohort(14))


def test_a_ready_hospital_that_has_left_is_not_sealed_in_while_others_are_enough() -> None:
    everyone = Reports(ready=frozenset(cohort(4)))
    assert decide(training(4), everyone, at(1, {"h02": 5000}), RULES) == machine.Seal(("h01", "h03", "h04"))
    gone = {"h02": 5000, "h03": 5000}
    assert decide(training(4), everyone, at(1, gone), RULES) == machine.Seal(cohort(4))


def test_below_the_quorum_the_attempt_waits_and_then_aborts() -> None:
    reports = Reports(ready=frozenset(cohort(10)))
    gone = dict.fromkeys(cohort(15)[10:], 9000)
    assert decide(training(), reports, at(100, gone), RULES) == machine.Wait(60_000)
    decision = decide(training(), reports, at(60_000, gone), RULES)
    assert isinstance(decision, machine.Abort)
    assert "only 10 of 15" in decision.reason
    assert "h11 (gone)" in decision.reason
    assert not decision.fatal


def test_a_small_cohort_needs_everyone() -> None:
    for n in (1, 2, 3):
        assert threshold(n) == n


def test_different_sums_abort_and_a_minority_is_named() -> None:
    attempt = agreeing_state()
    split = {name: "aa" if index < 10 else "bb" for index, name in enumerate(cohort(15))}
    decision = decide(attempt, Reports(digests=split), at(4), RULES)
    assert isinstance(decision, machine.Abort)
    assert "different sums" in decision.reason
    split["h11"] = "aa"
    decision = decide(attempt, Reports(digests=split), at(4), RULES)
    assert isinstance(decision, machine.Finalize)
    assert decision.dissenting == cohort(15)[11:]
    assert decision.finalizer in decision.agreeing


def test_late_digests_are_waited_for_briefly_once_a_quorum_agrees() -> None:
    attempt = agreeing_state()
    reports = Reports(digests=dict.fromkeys(cohort(11), "aa"), reached_ms={Kind.DIGEST: 1000})
    assert decide(attempt, reports, at(1000), RULES) == machine.Wait(3000)
    assert isinstance(decide(attempt, reports, at(3000), RULES), machine.Finalize)


def test_finalizers_take_turns_until_none_is_left() -> None:
    attempt = agreeing_state(4)
    digests = Reports(digests=dict.fromkeys(cohort(4), "aa"))
    named = []
    decision = decide(attempt, digests, at(4), RULES)
    while isinstance(decision, machine.Finalize):
        named.append(decision.finalizer)
        attempt = attempt.finalizing(decision.agreeing, decision.dissenting, decision.finalizer, 5, 30_000)
        decision = decide(attempt, digests, at(30_000), RULES)
    assert named == finalizer_order(attempt, cohort(4))
    assert decision == machine.Abort("no hospital computed the next state in time")


def test_a_dispute_is_fatal_and_ends_the_job() -> None:
    attempt = agreeing_state(4).finalizing(cohort(4), (), "h01", 5, 30_000).attested_by(SHA256, "", 6, 30_000)
    verdicts = {"h02": Verdict(True, ""), "h03": Verdict(False, "other weights"), "h04": Verdict(True, "")}
    decision = decide(attempt, Reports(verdicts=verdicts), at(7), RULES)
    assert isinstance(decision, machine.Abort)
    assert decision.fatal
    assert "h03: other weights" in decision.reason
    over = attempt.aborted(decision.reason, 8, fatal=True)
    assert decide(over, Reports(), at(9), RULES) == machine.EndJob(decision.reason)


def test_the_finalizer_counts_towards_the_quorum() -> None:
    attempt = agreeing_state(4).finalizing(cohort(4), (), "h01", 5, 30_000).attested_by(SHA256, "", 6, 30_000)
    assert machine.quorum(attempt) == 2
    verdicts = {"h02": Verdict(True, ""), "h03": Verdict(True, "")}
    reports = Reports(verdicts=verdicts, reached_ms={Kind.VERDICT: 7})
    assert decide(attempt, reports, at(7), RULES) == machine.Wait(2007)
    assert decide(attempt, reports, at(2007), RULES) == machine.Commit(("h01", "h02", "h03"))


def test_too_many_refusals_are_fatal_with_their_reasons() -> None:
    assert isinstance(decide(training(4), Reports(), at(1, declined=("h01",)), RULES), machine.Wait)
    decision = decide(training(4), Reports(), at(1, declined=("h01", "h02")), RULES)
    assert isinstance(decision, machine.Abort)
    assert decision.fatal
    assert "h02: no [data-invalid]" in decision.reason


@pytest.mark.parametrize(("failures", "ends"), [(0, False), (1, False), (2, True)])
def test_attempts_are_limited(failures: int, ends: bool) -> None:
    over = training(4, failures=failures).aborted("because", 5, fatal=False)
    assert isinstance(decide(over, Reports(), at(6), RULES), machine.EndJob) is ends


@pytest.mark.parametrize(("spent", "ends"), [(1, False), (2, True)])
def test_only_attempts_that_may_have_released_something_cost_privacy(spent: int, ends: bool) -> None:
    private = replace(RULES, extra_attempts=1)
    over = agreeing_state(4).aborted("because", 5, fatal=False)
    assert over.spent == 1
    assert training(4).aborted("because", 5, fatal=False).spent == 0
    assert isinstance(decide(replace(over, spent=spent), Reports(), at(6), private), machine.EndJob) is ends


# ---- random histories


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kind = st.sampled_from(["answer", "answer", "answer", "leave", "return", "decline", "time", "lie"])
    return draw(st.lists(st.tuples(kind, st.integers(0, 15), st.integers(1, 40_000)), max_size=150))


class World:
    """An attempt with hospitals around it, driven as the runner drives it."""

    def __init__(self, n: int) -> None:
        self.now = 0
        self.attempt = training(n)
        self.reports = Reports()
        self.absent_since: dict[str, int] = {}
        self.declined: set[str] = set()
        self.trail = [Phase.TRAINING]

    def around(self) -> Surroundings:
        absent = {name: self.now - since for name, since in self.absent_since.items()}
        return at(self.now, absent, tuple(self.declined))

    def answer(self, name: str, *, lie: bool) -> None:
        kind = ACCEPTS.get(self.attempt.phase)
        if kind is None or name not in self.attempt.members or name in self.declined or name in self.absent_since:
            return
        reports = self.reports
        if kind is Kind.READY:
            self.reports = replace(reports, ready=reports.ready | {name})
        elif kind is Kind.UPLOAD:
            self.reports = replace(reports, uploads={**reports.uploads, name: Upload(SHA256, 10)})
        elif kind is Kind.DIGEST:
            digests = {**reports.digests, name: "bb" if lie else "aa"}
            self.reports = replace(reports, digests=digests)
        elif kind is Kind.STATE:
            self.reports = replace(reports, states={**reports.states, name: State(SHA256, "")})
        else:
            verdict = Verdict(not lie, "another state" if lie else "")
            self.reports = replace(reports, verdicts={**reports.verdicts, name: verdict})
        held = {Kind.DIGEST: self.reports.digests, Kind.VERDICT: self.reports.verdicts}.get(kind, {})
        if len(held) == machine.quorum(self.attempt):
            self.reports = replace(self.reports, reached_ms={**self.reports.reached_ms, kind: self.now})

    def settle(self) -> machine.Decision:
        """Act until there is nothing to do now; the last decision."""
        for _ in range(100):
            decision = decide(self.attempt, self.reports, self.around(), RULES)
            if isinstance(decision, machine.Wait | machine.Reopen | machine.EndJob):
                return decision
            self.check(decision)
            self.attempt = self.apply(decision)
            self.trail.append(self.attempt.phase)
        raise AssertionError("the machine does not come to rest")

    def check(self, decision: machine.Decision) -> None:
        """What must hold whatever the history was."""
        needed = threshold(len(self.attempt.cohort))
        if isinstance(decision, machine.Seal):
            assert len(decision.group) >= needed
            assert set(decision.group) <= self.reports.ready
        elif isinstance(decision, machine.CloseSum):
            assert len(self.reports.uploads) >= needed
        elif isinstance(decision, machine.Finalize):
            assert len(decision.agreeing) >= needed
            assert len({self.reports.digests[name] for name in decision.agreeing}) == 1
            assert not set(decision.agreeing) & set(decision.dissenting)
            assert decision.finalizer in decision.agreeing
            assert decision.finalizer not in self.attempt.tried
        elif isinstance(decision, machine.Commit):
            assert len(decision.attesting) >= needed
            assert set(decision.attesting) <= set(self.attempt.agreeing)
            assert self.attempt.finalizer in decision.attesting
            assert all(verdict.agrees for verdict in self.reports.verdicts.values())
        elif isinstance(decision, machine.Abort):
            assert 0 < len(decision.reason) <= machine.REASON_LENGTH

    def apply(self, decision: machine.Decision) -> Attempt:
        attempt, now, ends = self.attempt, self.now, self.now + RULES.phase_ms
        match decision:
            case machine.Seal(group):
                return attempt.sealed(group, now)
            case machine.OpenSum():
                return attempt.uploading(100, now, ends)
            case machine.CloseSum():
                contributions = tuple(Contribution(name, SHA256) for name in sorted(self.reports.uploads))
                return attempt.summed(contributions, SHA256, now, ends)
            case machine.Finalize(agreeing, dissenting, finalizer):
                return attempt.finalizing(agreeing, dissenting, finalizer, now, ends)
            case machine.Attest(sha256, metrics_json):
                return attempt.attested_by(sha256, metrics_json, now, ends)
            case machine.Commit():
                return attempt.committed(now)
            case machine.Abort(reason, fatal):
                return attempt.aborted(reason, now, fatal=fatal)
        raise AssertionError(decision)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 16), steps())
def test_every_history_ends_with_a_quorum_or_an_abort(n: int, history: list[tuple[str, int, int]]) -> None:
    world = World(n)
    for kind, number, milliseconds in history:
        name = world.attempt.cohort[number % n]
        if kind in ("answer", "lie"):
            world.answer(name, lie=kind == "lie")
        elif kind == "leave":
            world.absent_since.setdefault(name, world.now)
        elif kind == "return":
            world.absent_since.pop(name, None)
        elif kind == "decline":
            world.declined.add(name)
        else:
            world.now += milliseconds
        decision = world.settle()
        if isinstance(decision, machine.Wait):
            assert decision.until_ms > world.now
            assert decision.until_ms <= world.attempt.deadline_ms
    # Time alone ends every attempt: each phase has its deadline, and there are at most n finalizers.
    for _ in range(2 * n + 8):
        decision = world.settle()
        if isinstance(decision, machine.Wait):
            world.now = decision.until_ms
    assert isinstance(decision, machine.Reopen | machine.EndJob)
    phases = [phase for phase in world.trail if phase is not Phase.ABORTED]
    assert phases == sorted(phases)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), steps())
def test_an_attempt_survives_the_store_unchanged(n: int, history: list[tuple[str, int, int]]) -> None:
    world = World(n)
    for kind, number, milliseconds in history:
        if kind in ("answer", "lie"):
            world.answer(world.attempt.cohort[number % n], lie=kind == "lie")
        elif kind == "time":
            world.now += milliseconds
        world.settle()
        fields = {str(key).encode(): str(value).encode() for key, value in record_fields(world.attempt).items()}
        assert parse_attempt(fields[b"core"]) == world.attempt
    record = {f"r:upload:{name}".encode(): report_value(item).encode() for name, item in world.reports.uploads.items()}
    record |= {f"r:verdict:{name}".encode(): report_value(v).encode() for name, v in world.reports.verdicts.items()}
    record |= {f"r:ready:{name}".encode(): b"0" for name in world.reports.ready}
    record |= {f"q:{kind}".encode(): str(ms).encode() for kind, ms in world.reports.reached_ms.items()}
    back = parse_reports(record)
    assert (back.uploads, back.verdicts, back.ready) == (
        world.reports.uploads,
        world.reports.verdicts,
        world.reports.ready,
    )
    assert back.reached_ms == world.reports.reached_ms
