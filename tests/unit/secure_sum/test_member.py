"""What a hospital refuses. n = 7, t = 5; each test breaks one rule of docs/secure-sum.md."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import MemberKeys
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import (
    Advert,
    Reveal,
    Share,
    Signed,
    Statement,
    Survivor,
    Survivors,
    adverts_digest,
    parse,
    sign,
    sign_bytes,
)
from tests.support.secure_sum import ATTEMPT, EPOCH, HASH, Consortium, names

ME, OTHER, THIRD, LAST = "hospital-01", "hospital-02", "hospital-03", "hospital-07"
ALL = names(7)


def refused(code: Code, call: Callable[..., object], *args: Any, **kwargs: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        call(*args, **kwargs)
    assert caught.value.code is code
    return caught.value


def again(consortium: Consortium, name: str, signed: Signed, kind: type[Statement], **changes: Any) -> Signed:
    """The same statement with changes, signed again by its speaker."""
    return sign(parse(kind, signed.statement).model_copy(update=changes), consortium.keys[name])


# begin


def test_a_roster_that_lists_other_keys_is_not_ones_own(begun: Consortium) -> None:
    refused(Code.STATEMENT_INVALID, Member, MemberKeys.generate(ME), begun.roster)
    refused(Code.STATEMENT_INVALID, Member, MemberKeys.generate("stranger"), begun.roster)
    mixed = dataclasses.replace(begun.keys[ME], sealing=begun.keys[OTHER].sealing)
    refused(Code.STATEMENT_INVALID, Member, mixed, begun.roster)


@pytest.mark.parametrize(
    ("cohort", "code"),
    [
        (ALL[:4], Code.PRIVACY_REFUSED),
        ([], Code.STATEMENT_INVALID),
        (ALL[1:], Code.STATEMENT_INVALID),
        ([*ALL, "stranger"], Code.STATEMENT_INVALID),
        ([*ALL[:4], ME], Code.STATEMENT_INVALID),
    ],
)
def test_a_cohort_is_t_members_of_the_roster_and_oneself(begun: Consortium, cohort: list[str], code: Code) -> None:
    refused(code, begun.member(ME).begin, ATTEMPT, EPOCH, cohort)


def test_every_attempt_has_fresh_secrets(begun: Consortium) -> None:
    member = begun.member(ME)
    first, second = (member.begin(ATTEMPT, EPOCH, ALL) for _ in range(2))
    assert first.self_seed != second.self_seed
    assert first.mask_seed != second.mask_seed
    assert first.transport_key != second.transport_key
    refused(Code.INVALID_ARGUMENT, member.begin, ATTEMPT, 0, ALL)


def test_a_state_does_not_show_its_secrets(received: Consortium) -> None:
    state = received.states[ME]
    shown = repr(state)
    for secret in (state.self_seed, state.mask_seed, state.transport_key, *state.shares_in[OTHER]):
        assert repr(secret) not in shown
        assert secret.hex() not in shown


def test_a_state_of_another_hospital_or_roster_is_refused(revealed: Consortium) -> None:
    state, other = revealed.states[ME], Consortium.of(7)
    for member in (revealed.member(OTHER), other.member(ME)):
        for step, arguments in (
            (member.share, (state.adverts,)),
            (member.receive, (state.sharers, [])),
            (member.mask_plan, ()),
            (member.commit, ("p", 1, 32, HASH, [HASH])),
            (member.confirm, (state.survivors,)),
            (member.reveal, ({},)),
            (member.agree, (HASH, bytes(32), HASH)),
        ):
            refused(Code.WRONG_STATE, step, state, *arguments)


# share


def group_with(begun: Consortium, name: str, **changes: Any) -> list[Signed]:
    """The group's adverts, one of them changed and signed again."""
    return [
        again(begun, name, signed, Advert, **changes) if signed.hospital_id == name else signed
        for signed in begun.adverts
    ]


def advertised(begun: Consortium, name: str) -> Advert:
    return parse(Advert, begun.states[name].advert.statement)


def test_a_group_below_t_is_refused(begun: Consortium) -> None:
    refused(Code.PRIVACY_REFUSED, begun.member(ME).share, begun.states[ME], begun.adverts[:4])
    assert begun.member(ME).share(begun.states[ME], begun.adverts[:5]).adverts


def test_a_group_without_ones_own_advert_is_refused(begun: Consortium) -> None:
    member, state = begun.member(ME), begun.states[ME]
    refused(Code.STATEMENT_INVALID, member.share, state, begun.adverts[1:])
    another = member.begin(ATTEMPT, EPOCH, ALL).advert
    refused(Code.STATEMENT_INVALID, member.share, state, [another, *begun.adverts[1:]])
    refused(Code.STATEMENT_INVALID, member.share, state, [another, *begun.adverts])


@pytest.mark.parametrize(
    "changes",
    [
        {"roster": HASH},
        {"epoch": 2},
        {"attempt": ATTEMPT.model_copy(update={"attempt": 2})},
        {"attempt": ATTEMPT.model_copy(update={"round": 2})},
        {"attempt": ATTEMPT.model_copy(update={"job_id": "another"})},
        {"mask_key": "00" * 32},
        {"mask_key": "01" + "00" * 31},
        {"transport_key": "ec" + "ff" * 30 + "7f"},
        {"mask_key": "ff" * 32},
        {"transport_key": "09" + "00" * 30 + "80"},
    ],
)
def test_an_advert_for_something_else_or_with_unfit_keys_is_refused(begun: Consortium, changes: dict[str, Any]) -> None:
    adverts = group_with(begun, OTHER, **changes)
    error = refused(Code.STATEMENT_INVALID, begun.member(ME).share, begun.states[ME], adverts)
    assert error.detail["culprit"] == OTHER


@pytest.mark.parametrize("field", ["mask_key", "transport_key", "seed_commitment"])
@pytest.mark.parametrize("source", ["mask_key", "transport_key", "seed_commitment"])
@pytest.mark.parametrize("victim", [ME, THIRD])
def test_no_value_occurs_twice_in_a_group(begun: Consortium, field: str, source: str, victim: str) -> None:
    value = getattr(advertised(begun, victim), source)
    adverts = group_with(begun, OTHER, **{field: value})
    refused(Code.STATEMENT_INVALID, begun.member(ME).share, begun.states[ME], adverts)


def test_one_key_for_two_purposes_is_refused(begun: Consortium) -> None:
    adverts = group_with(begun, OTHER, mask_key=advertised(begun, OTHER).transport_key)
    refused(Code.STATEMENT_INVALID, begun.member(ME).share, begun.states[ME], adverts)


def test_a_hospital_is_in_a_group_once(begun: Consortium) -> None:
    second = begun.member(OTHER).begin(ATTEMPT, EPOCH, ALL).advert
    for extra in (second, begun.states[OTHER].advert):
        adverts = [*begun.adverts[:5], extra]
        refused(Code.STATEMENT_INVALID, begun.member(ME).share, begun.states[ME], adverts)


def test_strangers_and_members_outside_the_cohort_are_refused(begun: Consortium) -> None:
    member, state = begun.member(ME), begun.states[ME]
    stranger = sign(advertised(begun, OTHER).model_copy(update={"hospital_id": "x"}), MemberKeys.generate("x"))
    refused(Code.STATEMENT_INVALID, member.share, state, [*begun.adverts[:6], stranger])
    impostor = dataclasses.replace(MemberKeys.generate(OTHER))
    forged = sign(advertised(begun, OTHER), impostor)
    refused(Code.STATEMENT_INVALID, member.share, state, [begun.adverts[0], forged, *begun.adverts[2:]])
    smaller = member.begin(ATTEMPT, EPOCH, ALL[:6])
    refused(Code.STATEMENT_INVALID, member.share, smaller, [smaller.advert, *begun.adverts[1:]])
    refused(Code.STATEMENT_INVALID, member.share, state, begun.adverts * 100)


def test_one_group_in_an_attempt(begun: Consortium) -> None:
    member = begun.member(ME)
    state = member.share(begun.states[ME], begun.adverts)
    assert member.share(state, begun.adverts[::-1]) == state
    refused(Code.EQUIVOCATION, member.share, state, begun.adverts[:6])
    other = group_with(begun, OTHER, seed_commitment=HASH)
    refused(Code.EQUIVOCATION, member.share, state, other)
    refused(Code.EQUIVOCATION, member.share, state, [])


# receive


def test_sharing_comes_before_receiving(begun: Consortium) -> None:
    refused(Code.WRONG_STATE, begun.member(ME).receive, begun.states[ME], ALL, [])


@pytest.mark.parametrize(
    ("sharers", "code"),
    [
        (ALL[:4], Code.PRIVACY_REFUSED),
        (ALL[1:], Code.STATEMENT_INVALID),
        ([], Code.STATEMENT_INVALID),
        ([*ALL, "stranger"], Code.STATEMENT_INVALID),
        ([*ALL, OTHER], Code.STATEMENT_INVALID),
    ],
)
def test_sharers_are_t_of_the_group_and_oneself(shared: Consortium, sharers: list[str], code: Code) -> None:
    known = [name for name in dict.fromkeys(sharers) if name in shared.states]
    received = shared.shares_for(ME, known)
    refused(code, shared.member(ME).receive, shared.states[ME], sharers, received)


def test_a_member_that_is_not_in_the_group_is_no_sharer(begun: Consortium) -> None:
    group = begun.copy()
    del group.states[LAST]
    group.share()
    member, state, received = group.member(ME), group.states[ME], group.shares_for(ME, ALL[:6])
    refused(Code.STATEMENT_INVALID, member.receive, state, ALL, received)
    # The outsider's share names the right group.
    digest = adverts_digest(state.adverts)
    outside = begun.deal(LAST, ME, SharePair(bytes(16), bytes(16)), adverts=digest)
    refused(Code.STATEMENT_INVALID, member.receive, state, ALL, [*received, outside])


def test_there_is_one_share_from_every_other_sharer(shared: Consortium) -> None:
    member, state, good = shared.member(ME), shared.states[ME], shared.shares_for(ME, ALL)
    for bad in (good[1:], [], [*good, good[0]], [*good[1:], good[-1]], good * 50):
        refused(Code.STATEMENT_INVALID, member.receive, state, ALL, bad)
    refused(Code.STATEMENT_INVALID, member.receive, state, ALL[:6], good)


def test_a_share_is_for_its_recipient_attempt_and_group(shared: Consortium) -> None:
    member, state, good = shared.member(ME), shared.states[ME], shared.shares_for(ME, ALL)
    for changes in (
        {"recipient": THIRD},
        {"recipient": OTHER},
        {"attempt": ATTEMPT.model_copy(update={"attempt": 2})},
        {"adverts": HASH},
    ):
        bad = again(shared, OTHER, good[0], Share, **changes)
        refused(Code.STATEMENT_INVALID, member.receive, state, ALL, [bad, *good[1:]])


def test_ones_own_shares_do_not_come_back(shared: Consortium) -> None:
    member, state, good = shared.member(ME), shared.states[ME], shared.shares_for(ME, ALL)
    reflected = again(shared, ME, state.shares_out[0], Share, recipient=ME)
    for bad in ([state.shares_out[0], *good[1:]], [reflected, *good[1:]], [reflected, *good]):
        refused(Code.STATEMENT_INVALID, member.receive, state, ALL, bad)


def test_a_share_is_signed_by_its_sender(shared: Consortium) -> None:
    member, state, good = shared.member(ME), shared.states[ME], shared.shares_for(ME, ALL)
    for bad in (
        good[0]._replace(signature=bytes(64)),
        good[0]._replace(hospital_id=THIRD),
        Signed(THIRD, good[0].statement, sign_bytes(good[0].statement, shared.keys[THIRD])),
    ):
        refused(Code.STATEMENT_INVALID, member.receive, state, ALL, [bad, *good[1:]])


def test_a_share_that_does_not_open_or_match_is_kept_out_and_named(shared: Consortium) -> None:
    good, pair = shared.shares_for(ME, ALL), SharePair(b"\x01" * 16, b"\x02" * 16)
    for_third = parse(Share, shared.shares_for(THIRD, [OTHER])[0].statement)
    for bad in (
        shared.deal(OTHER, ME, pair, committed=SharePair(bytes(16), pair.mask_share)),
        shared.deal(OTHER, ME, pair, committed=SharePair(pair.self_share, bytes(16))),
        shared.deal(OTHER, ME, SharePair(pair.mask_share, pair.self_share), committed=pair),
        shared.deal(OTHER, ME, pair, box="00" * 60),
        again(shared, OTHER, good[0], Share, box=for_third.box),
        again(shared, OTHER, good[0], Share, self_commitment=for_third.self_commitment),
    ):
        state = shared.member(ME).receive(shared.states[ME], ALL, [bad, *good[1:]])
        assert state.complaints == (OTHER,)
        assert sorted(state.shares_in) == [name for name in ALL if name != OTHER]


def test_one_list_of_sharers_in_an_attempt(shared: Consortium) -> None:
    member, good = shared.member(ME), shared.shares_for(ME, ALL)
    state = member.receive(shared.states[ME], ALL, good)
    assert member.receive(state, ALL[::-1], good[::-1]) == state
    refused(Code.EQUIVOCATION, member.receive, state, ALL[:6], good[:5])
    refused(Code.EQUIVOCATION, member.receive, state, ALL, good[:5])
    other = shared.deal(OTHER, ME, SharePair(bytes(16), bytes(16)))
    refused(Code.EQUIVOCATION, member.receive, state, ALL, [other, *good[1:]])


# mask and commit


def commit(consortium: Consortium, state: MemberState, **changes: Any) -> MemberState:
    arguments = {
        "parameter_set": "bfv-n4096-q60-t48-v2",
        "lanes": 1,
        "vector_length": 32,
        "ciphertext_sha256": HASH,
        "segments": [HASH],
    }
    return consortium.member(ME).commit(state, **{**arguments, **changes})


def test_receiving_comes_before_masking(shared: Consortium) -> None:
    refused(Code.WRONG_STATE, shared.member(ME).mask_plan, shared.states[ME])
    refused(Code.WRONG_STATE, commit, shared, shared.states[ME])


def test_a_mask_has_a_key_for_oneself_and_for_every_other_sharer(received: Consortium) -> None:
    plans = {name: received.member(name).mask_plan(received.states[name]) for name in ALL}
    keys = [key for plan in plans.values() for key, _ in plan]
    assert len(keys) == 49
    # Seven of their own, and one for each of 21 pairs.
    assert len(set(keys)) == 28
    assert [sign for _, sign in plans[ME]] == [1] * 7
    assert [sign for _, sign in plans[LAST]] == [1] + [-1] * 6
    assert [sign for _, sign in plans[THIRD]] == [1, -1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"lanes": 2},
        {"vector_length": 33},
        {"ciphertext_sha256": "cd" * 32},
        {"segments": [HASH, HASH]},
        {"parameter_set": "other"},
    ],
)
def test_one_upload_in_an_attempt(received: Consortium, changes: dict[str, Any]) -> None:
    state = commit(received, received.states[ME])
    assert commit(received, state) == state
    refused(Code.EQUIVOCATION, commit, received, state, **changes)


@pytest.mark.parametrize("changes", [{"lanes": 3}, {"ciphertext_sha256": "AB" * 32}, {"segments": []}])
def test_an_upload_that_cannot_be_said_is_refused(received: Consortium, changes: dict[str, Any]) -> None:
    refused(Code.INVALID_ARGUMENT, commit, received, received.states[ME], **changes)


# confirm


def listed(uploaded: Consortium) -> Survivors:
    copied = uploaded.copy()
    copied.confirm()
    return parse(Survivors, copied.survivors)


def test_uploading_comes_before_confirming(received: Consortium, uploaded: Consortium) -> None:
    survivors = listed(uploaded).encode()
    refused(Code.WRONG_STATE, received.member(ME).confirm, received.states[ME], survivors)


@pytest.mark.parametrize(
    "changes",
    [
        {"roster": HASH},
        {"epoch": 2},
        {"adverts": HASH},
        {"sharers": tuple(ALL[:6])},
        {"attempt": ATTEMPT.model_copy(update={"attempt": 2})},
        {"attempt": ATTEMPT.model_copy(update={"round": 2})},
        {"attempt": ATTEMPT.model_copy(update={"job_id": "another"})},
    ],
)
def test_a_list_of_survivors_of_something_else_is_refused(uploaded: Consortium, changes: dict[str, Any]) -> None:
    survivors = listed(uploaded).model_copy(update=changes).encode()
    refused(Code.STATEMENT_INVALID, uploaded.member(ME).confirm, uploaded.states[ME], survivors)


def test_a_list_of_survivors_names_ones_own_upload(uploaded: Consortium) -> None:
    good = listed(uploaded)
    member, state = uploaded.member(ME), uploaded.states[ME]
    others = good.survivors[1:]
    for own in (
        (),
        (Survivor(hospital_id=ME, upload=HASH),),
        (Survivor(hospital_id=ME, upload=good.survivors[0].upload, complaints=(OTHER,)),),
    ):
        survivors = good.model_copy(update={"survivors": own + others}).encode()
        refused(Code.STATEMENT_INVALID, member.confirm, state, survivors)


def test_a_list_of_survivors_below_t_is_refused(uploaded: Consortium) -> None:
    good = listed(uploaded)
    survivors = good.model_copy(update={"survivors": good.survivors[:4]}).encode()
    refused(Code.PRIVACY_REFUSED, uploaded.member(ME).confirm, uploaded.states[ME], survivors)


def test_a_list_of_survivors_has_one_spelling(uploaded: Consortium) -> None:
    member, state, spelling = uploaded.member(ME), uploaded.states[ME], listed(uploaded).encode()
    for bad in (spelling + b" ", spelling.replace(b",", b", "), b"", b"{}", uploaded.states[ME].advert.statement):
        refused(Code.STATEMENT_INVALID, member.confirm, state, bad)


def test_one_list_of_survivors_in_an_attempt(confirmed: Consortium) -> None:
    member, state = confirmed.member(ME), confirmed.states[ME]
    assert member.confirm(state, confirmed.survivors) == state
    good = parse(Survivors, confirmed.survivors)
    other = good.model_copy(update={"survivors": good.survivors[:5]}).encode()
    refused(Code.EQUIVOCATION, member.confirm, state, other)
    refused(Code.EQUIVOCATION, member.confirm, state, b"")


# reveal


def confirmations(confirmed: Consortium) -> dict[str, bytes]:
    return {name: confirmed.states[name].confirmation for name in ALL[:6]}


def test_confirming_comes_before_revealing(uploaded: Consortium, confirmed: Consortium) -> None:
    signatures = confirmations(confirmed)
    refused(Code.WRONG_STATE, uploaded.member(ME).reveal, uploaded.states[ME], signatures)


def test_nothing_is_revealed_for_fewer_than_t_signatures(confirmed: Consortium) -> None:
    member, state, good = confirmed.member(ME), confirmed.states[ME], confirmations(confirmed)
    four = {name: good[name] for name in ALL[:4]}
    refused(Code.PRIVACY_REFUSED, member.reveal, state, four)
    refused(Code.PRIVACY_REFUSED, member.reveal, state, {})
    assert member.reveal(state, {**four, ALL[4]: good[ALL[4]]}).reveal


def test_only_signatures_of_survivors_over_this_list_count(confirmed: Consortium) -> None:
    member, state, good = confirmed.member(ME), confirmed.states[ME], confirmations(confirmed)
    other = parse(Survivors, confirmed.survivors)
    other_list = other.model_copy(update={"survivors": other.survivors[:5]}).encode()
    stranger = MemberKeys.generate("stranger")
    four = {name: good[name] for name in ALL[:4]}
    for fifth in (
        {ALL[4]: good[OTHER]},
        {ALL[4]: bytes(64)},
        {ALL[4]: b""},
        {ALL[4]: sign_bytes(other_list, confirmed.keys[ALL[4]])},
        {LAST: sign_bytes(confirmed.survivors, confirmed.keys[LAST])},
        {"stranger": sign_bytes(confirmed.survivors, stranger)},
    ):
        refused(Code.STATEMENT_INVALID, member.reveal, state, {**four, **fifth})


def test_one_kind_of_share_of_every_sharer_is_revealed(revealed: Consortium) -> None:
    reveal = revealed.states[ME].reveal
    assert reveal is not None
    shares = parse(Reveal, reveal.statement).shares
    assert [(share.of, share.kind) for share in shares] == [
        *((name, "self") for name in ALL[:6]),
        (LAST, "mask"),
    ]
    held = revealed.states[ME].shares_in
    assert all(share.share == held[share.of].self_share.hex() for share in shares[:6])
    assert shares[6].share == held[LAST].mask_share.hex()


def test_a_reveal_is_the_same_whoever_signed(revealed: Consortium) -> None:
    member, state, good = revealed.member(ME), revealed.states[ME], confirmations(revealed)
    assert member.reveal(state, {name: good[name] for name in ALL[1:6]}) == state
    fresh = dataclasses.replace(state, reveal=None)
    assert member.reveal(fresh, {name: good[name] for name in ALL[1:6]}) == state


def test_one_attempt_of_a_round_is_revealed(revealed: Consortium) -> None:
    second = revealed.again(2)
    second.begin(ALL)
    second.share()
    second.receive(ALL)
    second.upload(ALL)
    signatures = second.confirm()
    member, state = second.member(ME), second.states[ME]
    refused(Code.EQUIVOCATION, member.reveal, state, signatures, others=[revealed.states[ME]])
    elsewhere = dataclasses.replace(revealed.states[ME], attempt=ATTEMPT.model_copy(update={"round": 2}))
    unrevealed = dataclasses.replace(revealed.states[ME], reveal=None)
    assert member.reveal(state, signatures, others=[elsewhere, unrevealed]).reveal


# agree


def test_confirming_comes_before_agreeing(uploaded: Consortium) -> None:
    refused(Code.WRONG_STATE, uploaded.member(ME).agree, uploaded.states[ME], HASH, bytes(32), HASH)


def test_one_digest_in_an_attempt(revealed: Consortium) -> None:
    member = revealed.member(ME)
    state = member.agree(revealed.states[ME], HASH, bytes(32), HASH)
    assert member.agree(state, HASH, bytes(32), HASH) == state
    other = "cd" * 32
    refused(Code.EQUIVOCATION, member.agree, state, other, bytes(32), HASH)
    refused(Code.EQUIVOCATION, member.agree, state, HASH, b"\1" * 32, HASH)
    refused(Code.EQUIVOCATION, member.agree, state, HASH, bytes(32), other)
    refused(Code.INVALID_ARGUMENT, member.agree, state, HASH, bytes(31), HASH)
