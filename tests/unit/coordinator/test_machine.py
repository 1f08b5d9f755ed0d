"""The state machine alone: single rules, and random histories of reports, absences, refusals and time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.domain import machine
from services.coordinator.domain.attempt import (
    ACCEPTS,
    GONE_MS,
    Agreement,
    Attempt,
    Contribution,
    Decline,
    Kind,
    Phase,
    Reports,
    Seen,
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
STATE, OTHER_STATE = "aa" * 32, "bb" * 32
LIST = '{"type":"survivors"}'


def cohort(n: int) -> tuple[str, ...]:
    return tuple(f"h{number:02d}" for number in range(1, n + 1))


def training(n: int = 15, **changes: Any) -> Attempt:
    attempt = Attempt("job", 1, 1, SHA256, 0, "", cohort(n), Phase.TRAINING, 0, 60_000, SHA256, n, 1)
    return replace(attempt, **changes)


def sharing(n: int = 15) -> Attempt:
    return training(n).sealed(cohort(n), SHA256, 1, 30_000)


def uploading(n: int = 15) -> Attempt:
    return sharing(n).shared(cohort(n), 2).uploading(100, 2, 30_000)


def confirming(n: int = 15) -> Attempt:
    return uploading(n).listed(tuple(Contribution(name, SHA256) for name in cohort(n)), LIST, 3, 30_000)


def unmasking(n: int = 15) -> Attempt:
    return confirming(n).confirmed(cohort(n)[: threshold(n)], 4, 30_000)


def agreeing_state(n: int = 15, finalizer: str = "h01") -> Attempt:
    return unmasking(n).summed(cohort(n)[: threshold(n)], SHA256, finalizer, 5, 30_000)


def seen(names: tuple[str, ...], digest: str = "d", state: str = STATE) -> dict[str, Seen]:
    return {name: Seen(digest, state, f'{{"from":{int(name[1:])}}}') for name in names}


def at(now_ms: int, absent: Mapping[str, int] | None = None, declined: tuple[str, ...] = ()) -> Surroundings:
    return Surroundings(now_ms, absent or {}, {name: Decline("data-invalid", "no") for name in declined})


def aborts(decision: machine.Decision, text: str) -> bool:
    return isinstance(decision, machine.Abort) and text in decision.reason and not decision.fatal


def burns(decision: machine.Decision, text: str) -> bool:
    return isinstance(decision, machine.Burn) and text in decision.reason


# ---- training


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


def test_a_suspended_hospital_is_not_waited_for_at_all() -> None:
    reports = Reports(ready=frozenset(cohort(14)))
    assert decide(training(), reports, at(1, {"h15": GONE_MS}), RULES) == machine.Seal(cohort(14))
    everyone = Reports(ready=frozenset(cohort(15)))
    assert decide(training(), everyone, at(1, {"h15": GONE_MS}), RULES) == machine.Seal(cohort(14))


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
    assert aborts(decision, "only 10 of 15 hospitals were ready")
    assert aborts(decision, "h11 (gone)")


def test_the_threshold_is_the_rosters_and_not_the_cohorts() -> None:
    part = training(11, roster_size=15)
    assert part.needed == 11
    ten = Reports(ready=frozenset(cohort(10)))
    assert aborts(decide(part, ten, at(60_000), RULES), "only 10 of 11 hospitals were ready to send their part, 11")
    assert decide(part, Reports(ready=frozenset(cohort(11))), at(1), RULES) == machine.Seal(cohort(11))


def test_a_small_roster_needs_everyone() -> None:
    for n in (1, 2, 3):
        assert threshold(n) == n


# ---- sharing and uploading


def test_sharers_are_those_whose_shares_are_there() -> None:
    everyone = Reports(shares=frozenset(cohort(15)))
    assert decide(sharing(), everyone, at(2), RULES) == machine.FixSharers(cohort(15))
    assert decide(sharing(), everyone, at(2, {"h03": 4000}), RULES) == machine.FixSharers(
        tuple(name for name in cohort(15) if name != "h03")
    )
    most = Reports(shares=frozenset(cohort(11)))
    assert decide(sharing(), most, at(2), RULES) == machine.Wait(30_000)
    assert decide(sharing(), most, at(2, dict.fromkeys(cohort(15)[11:], 4000)), RULES) == machine.FixSharers(cohort(11))
    assert decide(sharing(), most, at(30_000), RULES) == machine.FixSharers(cohort(11))


def test_too_few_shares_abort() -> None:
    few = Reports(shares=frozenset(cohort(10)))
    assert aborts(decide(sharing(), few, at(30_000), RULES), "only 10 of 15 hospitals shared their mask secrets, 11")


def test_fixed_sharers_open_the_sum_and_nobody_else_may_share() -> None:
    fixed = sharing().shared(cohort(12), 2)
    assert decide(fixed, Reports(), at(3), RULES) == machine.OpenSum()
    assert fixed.members == ()


def test_uploads_close_like_other_phases() -> None:
    sent = {name: Upload(SHA256, 9) for name in cohort(14)}
    assert decide(uploading(), Reports(uploads=sent), at(3), RULES) == machine.Wait(30_000)
    assert decide(uploading(), Reports(uploads=sent), at(3, {"h15": 4000}), RULES) == machine.CloseSum()
    few = dict(list(sent.items())[:10])
    assert aborts(decide(uploading(), Reports(uploads=few), at(30_000), RULES), "only 10 of 15 hospitals sent")


# ---- confirming: the point of no return


def test_survivors_are_stored_as_soon_as_t_confirm() -> None:
    ten = Reports(confirmations=frozenset(cohort(10)))
    assert decide(confirming(), ten, at(4), RULES) == machine.Wait(30_000)
    eleven = Reports(confirmations=frozenset(cohort(11)))
    assert decide(confirming(), eleven, at(4), RULES) == machine.StoreSurvivors(cohort(11))


def test_too_few_confirmations_abort() -> None:
    ten = Reports(confirmations=frozenset(cohort(10)))
    assert aborts(decide(confirming(), ten, at(30_000), RULES), "only 10 of 15 hospitals confirmed")


def test_enough_confirmations_never_abort_however_late_it_is_and_whoever_declines() -> None:
    eleven = Reports(confirmations=frozenset(cohort(11)))
    late = at(10**9, dict.fromkeys(cohort(15), 10**8), declined=cohort(15))
    assert decide(confirming(), eleven, late, RULES) == machine.StoreSurvivors(cohort(11))


@pytest.mark.parametrize("attempt", [unmasking(), agreeing_state()])
def test_from_stored_survivors_on_refusals_burn_and_do_not_abort(attempt: Attempt) -> None:
    late = at(30_000, declined=cohort(15))
    assert isinstance(decide(attempt, Reports(), late, RULES), machine.Burn)


# ---- unmasking


def test_masks_are_opened_as_soon_as_t_reveal() -> None:
    ten = Reports(reveals=frozenset(cohort(10)))
    assert decide(unmasking(), ten, at(5), RULES) == machine.Wait(30_000)
    gone = dict.fromkeys(cohort(15)[10:], 9000)
    assert decide(unmasking(), ten, at(5, gone), RULES) == machine.Wait(30_000)
    eleven = Reports(reveals=frozenset(cohort(11)))
    assert decide(unmasking(), eleven, at(5), RULES) == machine.OpenMasks(cohort(11))


def test_too_few_reveals_burn_the_version() -> None:
    ten = Reports(reveals=frozenset(cohort(10)))
    assert burns(decide(unmasking(), ten, at(30_000), RULES), "only 10 of 15 hospitals revealed")


def test_masks_that_do_not_open_wait_for_more_reveals_and_then_name_the_culprit() -> None:
    stuck = unmasking().stuck(11, "the opened seed of h03 is not the one that it advertised")
    eleven, twelve = Reports(reveals=frozenset(cohort(11))), Reports(reveals=frozenset(cohort(12)))
    assert decide(stuck, eleven, at(5), RULES) == machine.Wait(30_000)
    assert decide(stuck, twelve, at(5), RULES) == machine.OpenMasks(cohort(12))
    assert burns(decide(stuck, eleven, at(30_000), RULES), "seed of h03")
    everyone = Reports(reveals=frozenset(cohort(15)))
    assert burns(decide(stuck.stuck(15, "seed of h03"), everyone, at(5), RULES), "seed of h03")


def test_survivors_that_return_are_all_needed() -> None:
    returned = unmasking().uploading(100, 6, 30_000)
    assert returned.bound
    assert returned.members == cohort(15)
    assert machine.quorum(returned) == 15
    sent = {name: Upload(SHA256, 9) for name in cohort(14)}
    gone = at(7, {"h15": 10**6})
    assert decide(returned, Reports(uploads=sent), gone, RULES) == machine.Wait(30_000)
    assert burns(decide(returned, Reports(uploads=sent), at(30_000), RULES), "only 14 of 15 hospitals sent their part")
    everyone = {**sent, "h15": Upload(SHA256, 9)}
    assert decide(returned, Reports(uploads=everyone), at(7), RULES) == machine.CloseSum()


# ---- agreeing


def test_a_quorum_with_the_finalizer_commits_at_once() -> None:
    attempt = agreeing_state()
    reports = Reports(digests=seen(cohort(11)))
    agreement = Agreement(cohort(11), (), STATE, cohort(11))
    assert decide(attempt, reports, at(6), RULES) == machine.Commit(agreement, STATE, '{"from":1}', cohort(11))


def test_the_finalizer_is_waited_for_briefly_once_the_others_agree() -> None:
    attempt = agreeing_state(finalizer="h15")
    reports = Reports(digests=seen(cohort(11)), reached_ms={Kind.DIGEST: 1000})
    assert decide(attempt, reports, at(1000), RULES) == machine.Wait(3000)
    decision = decide(attempt, reports, at(3000), RULES)
    assert isinstance(decision, machine.Finalize)
    assert decision.finalizer in cohort(11)
    assert decision.agreement.stating == cohort(11)
    late = Reports(digests={**reports.digests, **seen(("h15",))}, reached_ms={Kind.DIGEST: 1000})
    assert isinstance(decide(attempt, late, at(1001), RULES), machine.Commit)


def test_dissenters_are_named_and_excluded() -> None:
    attempt = agreeing_state()
    digests = seen(cohort(15)[:11]) | seen(cohort(15)[11:], digest="other")
    decision = decide(attempt, Reports(digests=digests), at(6), RULES)
    assert isinstance(decision, machine.Commit)
    assert decision.agreement.dissenting == cohort(15)[11:]
    assert decision.attesting == cohort(11)


def test_a_finalizer_that_saw_something_else_is_replaced_at_once() -> None:
    attempt = agreeing_state(finalizer="h15")
    digests = seen(cohort(11)) | seen(("h15",), digest="other")
    decision = decide(attempt, Reports(digests=digests, reached_ms={Kind.DIGEST: 6}), at(6), RULES)
    assert isinstance(decision, machine.Finalize)
    assert decision.agreement.dissenting == ("h15",)
    assert decision.finalizer in cohort(11)


def test_a_finalizer_with_another_state_is_replaced_when_t_have_one_state() -> None:
    attempt = agreeing_state(finalizer="h15")
    digests = seen(cohort(11)) | seen(("h15",), state=OTHER_STATE)
    decision = decide(attempt, Reports(digests=digests, reached_ms={Kind.DIGEST: 6}), at(6), RULES)
    assert isinstance(decision, machine.Finalize)
    assert decision.agreement == Agreement((*cohort(11), "h15"), (), STATE, cohort(11))
    assert decision.finalizer in cohort(11)


def test_states_that_differ_in_their_last_bits_are_attested() -> None:
    attempt = agreeing_state()
    digests = seen(cohort(15)[:8]) | seen(cohort(15)[8:], state=OTHER_STATE)
    decision = decide(attempt, Reports(digests=digests), at(6), RULES)
    assert decision == machine.Attest(Agreement(cohort(15)), STATE, '{"from":1}')


def test_different_sums_burn() -> None:
    attempt = agreeing_state()
    digests = seen(cohort(15)[:10]) | seen(cohort(15)[10:], digest="other")
    assert burns(decide(attempt, Reports(digests=digests), at(6), RULES), "different sums (groups of 10, 5; 11 equal")
    ten = Reports(digests=seen(cohort(10)))
    assert decide(attempt, ten, at(6), RULES) == machine.Wait(30_000)
    assert burns(decide(attempt, ten, at(30_000), RULES), "only 10 of 15 hospitals decrypted the sum")


# ---- finalizing and attesting, the fallbacks


def finalizing(n: int = 4, finalizer: str = "h02") -> Attempt:
    agreement = Agreement(cohort(n), (), STATE, cohort(n))
    return agreeing_state(n).agreed(agreement, 6).finalizing(finalizer, 6, 30_000)


def test_a_finalizer_with_the_quorums_state_commits_without_attestation() -> None:
    reports = Reports(states={"h02": State(STATE, "{}")})
    decision = decide(finalizing(), reports, at(7), RULES)
    assert decision == machine.Commit(finalizing().agreement, STATE, "{}", cohort(4))
    other = Reports(states={"h02": State(OTHER_STATE, "{}")})
    assert decide(finalizing(), other, at(7), RULES) == machine.Attest(finalizing().agreement, OTHER_STATE, "{}")


def test_finalizers_take_turns_until_none_is_left() -> None:
    attempt = agreeing_state(4)
    named = ["h01"]
    digests = seen(("h02", "h03", "h04"))
    decision = decide(attempt, Reports(digests=digests, reached_ms={Kind.DIGEST: 6}), at(30_000), RULES)
    while isinstance(decision, machine.Finalize):
        named.append(decision.finalizer)
        attempt = attempt.agreed(decision.agreement, 6).finalizing(decision.finalizer, 6, 30_000)
        decision = decide(attempt, Reports(), at(30_000), RULES)
    assert named == ["h01", *finalizer_order(attempt, ("h02", "h03", "h04"))]
    assert decision == machine.Burn("no hospital stored the next state in time")


def test_a_refused_commit_names_another_finalizer_and_then_burns() -> None:
    attempt = agreeing_state(4).agreed(Agreement(cohort(4), (), STATE, cohort(4)), 6)
    decision = machine.after_refusal(attempt, at(7), RULES, "the state was not stored")
    assert isinstance(decision, machine.Finalize)
    assert decision.finalizer != "h01"
    tried = replace(attempt, tried=cohort(4))
    assert machine.after_refusal(tried, at(7), RULES, "not stored") == machine.Burn("not stored")


def attesting(n: int = 4) -> Attempt:
    return agreeing_state(n).agreed(Agreement(cohort(n)), 6).attested_by(SHA256, "", 6, 30_000)


def test_a_dispute_is_fatal_and_ends_the_job() -> None:
    verdicts = {"h02": Verdict(True, ""), "h03": Verdict(False, "other weights"), "h04": Verdict(True, "")}
    decision = decide(attesting(), Reports(verdicts=verdicts), at(7), RULES)
    assert isinstance(decision, machine.Abort)
    assert decision.fatal
    assert "h03: other weights" in decision.reason
    over = attesting().aborted(decision.reason, 8, fatal=True)
    assert decide(over, Reports(), at(9), RULES) == machine.EndJob(decision.reason)


def test_the_finalizer_counts_towards_the_quorum_of_attestations() -> None:
    assert machine.quorum(attesting()) == 2
    verdicts = {"h02": Verdict(True, ""), "h03": Verdict(True, "")}
    reports = Reports(verdicts=verdicts, reached_ms={Kind.VERDICT: 7})
    assert decide(attesting(), reports, at(7), RULES) == machine.Wait(2007)
    commit = machine.Commit(Agreement(cohort(4)), SHA256, "", ("h01", "h02", "h03"))
    assert decide(attesting(), reports, at(2007), RULES) == commit


def test_too_few_attestations_burn() -> None:
    reports = Reports(verdicts={"h02": Verdict(True, "")})
    assert burns(decide(attesting(), reports, at(30_000), RULES), "only 2 of 4 hospitals checked the next state")


# ---- the end of attempts


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
    over = uploading(4).aborted("because", 5, fatal=False)
    assert over.spent == 1
    assert confirming(4).aborted("because", 5, fatal=False).spent == 1
    assert training(4).aborted("because", 5, fatal=False).spent == 0
    assert sharing(4).aborted("because", 5, fatal=False).spent == 0
    assert isinstance(decide(replace(over, spent=spent), Reports(), at(6), private), machine.EndJob) is ends


def test_a_burnt_version_is_followed_by_the_next_round() -> None:
    burnt = unmasking().burnt("too few reveals", 9)
    assert burnt.ended_in is Phase.UNMASK
    assert burnt.spent == 0
    assert decide(burnt, Reports(), at(10), RULES) == machine.Reopen()


# ---- random histories


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kind = st.sampled_from(["answer"] * 5 + ["everyone", "leave", "return", "decline", "time", "lie"])
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
        r = self.reports
        name_set = {
            Kind.READY: "ready",
            Kind.SHARES: "shares",
            Kind.CONFIRMATION: "confirmations",
            Kind.REVEAL: "reveals",
        }.get(kind)
        if name_set is not None:
            self.reports = replace(r, **{name_set: getattr(r, name_set) | {name}})
        elif kind is Kind.UPLOAD:
            self.reports = replace(r, uploads={**r.uploads, name: Upload(SHA256, 10)})
        elif kind is Kind.DIGEST:
            # A liar lies about the sum, or only about the state.
            told = Seen("d", STATE, "") if not lie else Seen("x" if self.now % 2 else "d", OTHER_STATE, "")
            self.reports = replace(r, digests={**r.digests, name: told})
        elif kind is Kind.STATE:
            self.reports = replace(r, states={**r.states, name: State(OTHER_STATE if lie else STATE, "")})
        else:
            verdict = Verdict(not lie, "another state" if lie else "")
            self.reports = replace(r, verdicts={**r.verdicts, name: verdict})
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
        needed = self.attempt.needed
        reports = self.reports
        if isinstance(decision, machine.Abort):
            # Nothing aborts once the survivors are stored, but a dispute, which stops the job.
            assert not self.attempt.bound or (decision.fatal and self.attempt.phase is Phase.ATTEST)
            assert 0 < len(decision.reason) <= machine.REASON_LENGTH
        elif isinstance(decision, machine.Burn):
            assert self.attempt.bound
            assert 0 < len(decision.reason) <= machine.REASON_LENGTH
        elif isinstance(decision, machine.Seal):
            assert len(decision.group) >= needed
            assert set(decision.group) <= reports.ready
        elif isinstance(decision, machine.FixSharers):
            assert len(decision.sharers) >= needed
            assert set(decision.sharers) <= reports.shares & set(self.attempt.group)
        elif isinstance(decision, machine.CloseSum):
            assert len(reports.uploads) >= needed
        elif isinstance(decision, machine.StoreSurvivors):
            assert len(decision.confirming) >= needed
            assert set(decision.confirming) <= reports.confirmations
        elif isinstance(decision, machine.OpenMasks):
            assert len(decision.revealing) >= needed
            assert set(decision.revealing) <= reports.reveals
        else:
            self.check_agreement(decision)

    def check_agreement(self, decision: machine.Decision) -> None:
        needed, attempt = self.attempt.needed, self.attempt
        if not isinstance(decision, machine.Finalize | machine.Attest | machine.Commit):
            return
        agreement = decision.agreement
        assert len(agreement.agreeing) >= needed
        assert len({self.reports.digests[name].digest for name in agreement.agreeing}) == 1
        assert not set(agreement.agreeing) & set(agreement.dissenting)
        if isinstance(decision, machine.Finalize):
            assert decision.finalizer in agreement.agreeing
            assert decision.finalizer not in attempt.tried
        elif isinstance(decision, machine.Commit):
            assert len(decision.attesting) >= needed
            assert set(decision.attesting) <= set(agreement.agreeing)
            assert attempt.finalizer in decision.attesting
            assert all(verdict.agrees for verdict in self.reports.verdicts.values())

    def apply(self, decision: machine.Decision) -> Attempt:
        attempt, now, ends = self.attempt, self.now, self.now + RULES.phase_ms
        match decision:
            case machine.Seal(group):
                return attempt.sealed(group, SHA256, now, ends)
            case machine.FixSharers(sharers):
                return attempt.shared(sharers, now)
            case machine.OpenSum():
                return attempt.uploading(100, now, ends)
            case machine.CloseSum():
                contributions = tuple(Contribution(name, SHA256) for name in sorted(self.reports.uploads))
                return attempt.listed(contributions, LIST, now, ends)
            case machine.StoreSurvivors(confirming):
                return attempt.confirmed(confirming, now, ends)
            case machine.OpenMasks(revealing):
                if self.now % 7 == 0:
                    return attempt.stuck(len(revealing), "a seed does not fit")
                finalizer = machine.first_finalizer(attempt, self.around(), RULES)
                return attempt.summed(revealing, SHA256, finalizer, now, ends)
            case machine.Finalize(agreement, finalizer):
                return attempt.agreed(agreement, now).finalizing(finalizer, now, ends)
            case machine.Attest(agreement, sha256, metrics_json):
                return attempt.agreed(agreement, now).attested_by(sha256, metrics_json, now, ends)
            case machine.Commit(agreement):
                return attempt.agreed(agreement, now).committed(now)
            case machine.Abort(reason, fatal):
                return attempt.aborted(reason, now, fatal=fatal)
            case machine.Burn(reason):
                return attempt.burnt(reason, now)
        raise AssertionError(decision)


ORDER = [*ACCEPTS, Phase.COMMITTED]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16), steps())
def test_every_history_ends_with_a_quorum_an_abort_or_a_burnt_version(
    n: int, history: list[tuple[str, int, int]]
) -> None:
    world = World(n)
    for kind, number, milliseconds in history:
        name = world.attempt.cohort[number % n]
        if kind in ("answer", "lie"):
            world.answer(name, lie=kind == "lie")
        elif kind == "everyone":
            for other in world.attempt.members:
                world.answer(other, lie=False)
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
    for _ in range(2 * n + 12):
        decision = world.settle()
        if isinstance(decision, machine.Wait):
            world.now = decision.until_ms
    assert isinstance(decision, machine.Reopen | machine.EndJob)
    places = [ORDER.index(phase) for phase in world.trail if phase in ORDER]
    assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), steps())
def test_an_attempt_survives_the_store_unchanged(n: int, history: list[tuple[str, int, int]]) -> None:
    world = World(n)
    for kind, number, milliseconds in history:
        if kind in ("answer", "lie"):
            world.answer(world.attempt.cohort[number % n], lie=kind == "lie")
        elif kind == "everyone":
            for other in world.attempt.members:
                world.answer(other, lie=False)
        elif kind == "time":
            world.now += milliseconds
        world.settle()
        fields = {str(key).encode(): str(value).encode() for key, value in record_fields(world.attempt).items()}
        assert parse_attempt(fields[b"core"]) == world.attempt
    held = world.reports
    record = {f"r:upload:{name}".encode(): report_value(item).encode() for name, item in held.uploads.items()}
    record |= {f"r:digest:{name}".encode(): report_value(item).encode() for name, item in held.digests.items()}
    record |= {f"r:state:{name}".encode(): report_value(item).encode() for name, item in held.states.items()}
    record |= {f"r:verdict:{name}".encode(): report_value(item).encode() for name, item in held.verdicts.items()}
    for kind, names in (
        (Kind.READY, held.ready),
        (Kind.SHARES, held.shares),
        (Kind.CONFIRMATION, held.confirmations),
        (Kind.REVEAL, held.reveals),
    ):
        record |= {f"r:{kind}:{name}".encode(): b"0" for name in names}
    record |= {f"q:{kind}".encode(): str(ms).encode() for kind, ms in held.reached_ms.items()}
    assert parse_reports(record) == held
