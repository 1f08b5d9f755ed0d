"""The comparison of what was acknowledged with what is stored finds each kind of loss, doubling and falsehood."""

from dataclasses import replace

import pytest

from loadtests.chaos.ledger import Committed, Findings, Hospital, Stored, Truth, compare, counted, rounds_of

JOB = "job-1"
NAMES = ("h1", "h2", "h3", "h4")
CIPHERTEXTS = {name: f"cipher-{name}" for name in NAMES}
ROUND = Committed(attempt=2, sum_sha256="sum", burnt=False, contributions=CIPHERTEXTS)
EXPECTED = {(JOB, 1): "digest"}
HOSPITALS = {
    name: Hospital(
        ciphertexts={(JOB, 1, 2): CIPHERTEXTS[name]},
        revealed=frozenset({(JOB, 1, 2)}),
        sums={1: "digest"},
        ledger=("a", "b"),
    )
    for name in NAMES
}
TRUTH = Truth(
    appended={"e0": 0},
    recorded=frozenset({"e1"}),
    plans=frozenset({"plan"}),
    rounds={(JOB, 1): ROUND},
    rows=frozenset({1, 2}),
    hospitals=HOSPITALS,
)
STORED = Stored(
    entries=((0, "e0", "chaos.noted", None), (1, "e1", "chaos.noted", None), (2, "e2", "round.committed", (JOB, 1))),
    plans=("plan", "another"),
    rounds={(JOB, 1): ROUND},
    survivors={(JOB, 1): (2, frozenset(NAMES))},
    ledgers=dict.fromkeys(NAMES, ("a", "b")),
    charges={(name, JOB, 1, 2): 1 for name in NAMES},
    rows=frozenset({1, 2, 3}),
)


def found(truth: Truth = TRUTH, stored: Stored = STORED, expected: dict[tuple[str, int], str] = EXPECTED) -> Findings:
    return compare(truth, stored, expected)


def test_hospitals_count_states_and_a_burnt_version_has_none() -> None:
    burnt = replace(ROUND, burnt=True)
    three = {(JOB, version): (1, frozenset(NAMES)) for version in (1, 2, 3)}
    stored = replace(STORED, rounds={(JOB, 1): ROUND, (JOB, 2): burnt, (JOB, 3): ROUND}, survivors=three)
    assert counted(stored) == {(JOB, 1): (JOB, 1), (JOB, 2): (JOB, 2), (JOB, 3): (JOB, 2)}


def test_what_agrees_has_no_findings() -> None:
    result = found()
    assert (result.lost, result.doubled, result.inexact, result.notes) == (0, 0, 0, [])
    assert result.checked["contributions"] == 4


@pytest.mark.parametrize(
    ("stored", "word"),
    [
        (replace(STORED, entries=STORED.entries[1:]), "audit entry 0"),
        (replace(STORED, entries=(STORED.entries[0], STORED.entries[2])), "event e1"),
        (replace(STORED, entries=STORED.entries[:2]), "audit entry of round 1"),
        (replace(STORED, plans=()), "plan plan"),
        (replace(STORED, rounds={}), "round 1 of job job-1"),
        (replace(STORED, rounds={(JOB, 1): replace(ROUND, sum_sha256="other")}), "round 1 of job job-1"),
        (replace(STORED, survivors={}), "accepted contributions"),
        (replace(STORED, survivors={(JOB, 1): (1, frozenset(NAMES))}), "for whom h1 revealed"),
        (replace(STORED, survivors={(JOB, 1): (2, frozenset(NAMES[1:]))}), "accepted contributions"),
        (replace(STORED, ledgers={**STORED.ledgers, "h2": ("a",)}), "ledger of h2"),
        (replace(STORED, ledgers={**STORED.ledgers, "h2": ("a", "x")}), "ledger of h2"),
        (replace(STORED, rows=frozenset({1})), "row 2"),
    ],
)
def test_what_is_missing_or_otherwise_is_lost(stored: Stored, word: str) -> None:
    result = found(stored=stored)
    assert result.lost >= 1
    assert any(word in note for note in result.notes), result.notes


@pytest.mark.parametrize(
    ("stored", "word"),
    [
        (replace(STORED, entries=(*STORED.entries, (3, "e1", "chaos.noted", None))), "event e1"),
        (replace(STORED, entries=(*STORED.entries, (3, "e9", "round.committed", (JOB, 1)))), "audit entry of round 1"),
        (replace(STORED, charges={("h1", JOB, 1, 2): 2}), "charge"),
        (
            replace(
                STORED,
                rounds={**STORED.rounds, (JOB, 2): replace(ROUND, attempt=1)},
                survivors={**STORED.survivors, (JOB, 2): (1, frozenset(NAMES))},
                entries=(*STORED.entries, (3, "e3", "round.committed", (JOB, 2))),
            ),
            "contribution cipher-h1",
        ),
    ],
)
def test_what_is_there_twice_is_doubled(stored: Stored, word: str) -> None:
    result = found(stored=stored)
    assert result.doubled >= 1
    assert any(word in note for note in result.notes), result.notes


def test_a_sum_that_is_not_the_survivors_is_wrong() -> None:
    assert found(expected={(JOB, 1): "another"}).inexact == 5  # four hospitals, and nobody holds the right one


def test_too_few_hospitals_with_the_sum_are_wrong() -> None:
    quiet = {name: replace(own, sums={}) for name, own in HOSPITALS.items() if name != "h1"}
    assert found(truth=replace(TRUTH, hospitals={**HOSPITALS, **quiet})).inexact == 1


def test_the_round_that_the_end_interrupted_may_be_with_a_few_hospitals_but_not_with_a_wrong_sum() -> None:
    stored = replace(STORED, survivors={**STORED.survivors, (JOB, 2): (1, frozenset(NAMES))})
    expected = {**EXPECTED, (JOB, 2): "second"}
    assert found(stored=stored, expected=expected).inexact == 0
    wrong = {**HOSPITALS, "h1": replace(HOSPITALS["h1"], sums={1: "digest", 2: "other"})}
    assert found(truth=replace(TRUTH, hospitals=wrong), stored=stored, expected=expected).inexact == 1


def test_the_exact_sum_of_a_burnt_version_is_no_wrong_sum() -> None:
    burnt = Committed(attempt=1, sum_sha256="", burnt=True, contributions={})
    stored = replace(
        STORED,
        rounds={(JOB, 1): burnt, (JOB, 2): ROUND},
        survivors={(JOB, 1): (1, frozenset(NAMES[:3])), (JOB, 2): (2, frozenset(NAMES))},
        entries=(*STORED.entries[:2], (2, "e2", "round.burnt", (JOB, 1)), (3, "e3", "round.committed", (JOB, 2))),
    )
    hospitals = {
        name: replace(own, revealed=frozenset(), ciphertexts={(JOB, 2, 2): CIPHERTEXTS[name]})
        for name, own in HOSPITALS.items()
    }
    late = {**hospitals, "h1": replace(hospitals["h1"], sums={1: "of the burnt"})}
    truth = replace(TRUTH, rounds={(JOB, 2): ROUND}, hospitals=late)
    assert found(truth, stored, {(JOB, 1): "of the burnt", (JOB, 2): "digest"}).inexact == 0
    assert found(truth, stored, {(JOB, 1): "another", (JOB, 2): "digest"}).inexact == 1


def test_a_ciphertext_that_the_hospital_did_not_send_is_wrong() -> None:
    other = {**HOSPITALS, "h3": replace(HOSPITALS["h3"], ciphertexts={(JOB, 1, 2): "other"})}
    result = found(truth=replace(TRUTH, hospitals=other))
    assert (result.inexact, result.lost) == (1, 0)


def test_a_burnt_round_needs_no_contributions() -> None:
    burnt = Committed(attempt=2, sum_sha256="", burnt=True, contributions={})
    stored = replace(
        STORED, rounds={(JOB, 1): burnt}, entries=(*STORED.entries[:2], (2, "e2", "round.burnt", (JOB, 1)))
    )
    assert found(replace(TRUTH, rounds={(JOB, 1): burnt}), stored).lost == 0


def test_a_log_that_does_not_verify_or_an_outbox_that_waits_is_wrong() -> None:
    assert found(stored=replace(STORED, log_wrong=1)).inexact == 1
    assert found(stored=replace(STORED, outbox_waiting=7)).inexact == 1


def test_rounds_are_read_back_as_they_were_noted() -> None:
    assert rounds_of([[1.5, JOB, 1, 2, "sum", False, dict(CIPHERTEXTS)]]) == {(JOB, 1): ROUND}
