"""The state machine alone, rule by rule."""

from dataclasses import replace

import pytest

from services.coordinator.domain import machine
from services.coordinator.domain.attempt import (
    GONE_MS,
    Agreement,
    Attempt,
    Kind,
    Phase,
    Reports,
    State,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import decide, finalizer_order
from services.secure_sum.cohort import threshold
from tests.support.attempts import (
    OTHER_STATE,
    RULES,
    SHA256,
    STATE,
    agreeing_state,
    at,
    cohort,
    confirming,
    seen,
    sharing,
    training,
    unmasking,
    uploading,
)


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


# ---- training, asynchronous


def test_enough_ready_hospitals_are_sealed_while_others_train_on() -> None:
    attempt = training(enough=12, oldest=3)
    reports = Reports(ready=frozenset(cohort(12)))
    assert decide(attempt, reports, at(1), RULES) == machine.Seal(cohort(12))
    assert decide(attempt, Reports(ready=frozenset(cohort(11))), at(1), RULES) == machine.Wait(60_000)
    assert machine.quorum(attempt) == 12, "the twelfth report wakes the driver"


def test_a_group_below_the_threshold_is_never_sealed_whatever_k_says() -> None:
    attempt = training(enough=3, oldest=3)
    ten = Reports(ready=frozenset(cohort(10)))
    assert decide(attempt, ten, at(1), RULES) == machine.Wait(60_000)
    assert aborts(decide(attempt, ten, at(60_000), RULES), "only 10 of 15 hospitals were ready")
    assert machine.quorum(attempt) == 11


def test_who_left_does_not_count_towards_k() -> None:
    attempt = training(enough=12, oldest=3)
    reports = Reports(ready=frozenset(cohort(12)))
    assert decide(attempt, reports, at(1, {"h01": 5000}), RULES) == machine.Wait(60_000)
    thirteen = Reports(ready=frozenset(cohort(13)))
    assert decide(attempt, thirteen, at(1, {"h01": 5000}), RULES) == machine.Seal(cohort(13)[1:])


def test_with_fewer_than_k_left_the_threshold_is_enough() -> None:
    attempt = training(enough=14, oldest=3)
    reports = Reports(ready=frozenset(cohort(12)))
    gone = dict.fromkeys(cohort(15)[12:], 5000)
    assert decide(attempt, reports, at(1, gone), RULES) == machine.Seal(cohort(12))
    assert decide(attempt, reports, at(60_000), RULES) == machine.Seal(cohort(12))


def test_ages_go_with_the_group() -> None:
    attempt = training(4, round=3, base_version=2, enough=3, oldest=2)
    sealed = attempt.sealed({"h03": 2, "h01": 0, "h02": 1}, SHA256, 1, 30_000)
    assert (sealed.group, sealed.ages) == (("h01", "h02", "h03"), (0, 1, 2))
    assert [sealed.age(name) for name in ("h01", "h02", "h03", "h04")] == [0, 1, 2, 0]
    of_the_release_before = replace(sealed, ages=())
    assert of_the_release_before.age("h03") == 0


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
    assert decide(over, Reports(), at(9), RULES) == machine.EndJob(decision.reason, machine.Cause.DISPUTED)


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
    over = training(4).aborted(decision.reason, 2, fatal=True)
    assert decide(over, Reports(), at(3), RULES) == machine.EndJob(decision.reason, machine.Cause.DECLINED)


@pytest.mark.parametrize(("failures", "ends"), [(0, False), (1, False), (2, True)])
def test_attempts_are_limited(failures: int, ends: bool) -> None:
    over = training(4, failures=failures).aborted("because", 5, fatal=False)
    decision = decide(over, Reports(), at(6), RULES)
    assert isinstance(decision, machine.EndJob) is ends
    assert not ends or decision.cause is machine.Cause.ATTEMPTS  # type: ignore[union-attr]


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
