"""What the centre, or a hospital that checks the centre, refuses. n = 7, t = 5, f = 2; hospital 7 dropped out."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum import opening, shares
from services.secure_sum.opening import MaskKey, Opening
from services.secure_sum.roster import MemberKeys
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import (
    Advert,
    Digest,
    Reveal,
    RevealedShare,
    Share,
    Signed,
    SigningKeys,
    Statement,
    Survivors,
    Upload,
    adverts_digest,
    parse,
    sharers_digest,
    sign,
    sign_bytes,
)
from tests.support.secure_sum import ATTEMPT, EPOCH, HASH, Consortium, names

ME, OTHER, THIRD, LAST = "hospital-01", "hospital-02", "hospital-03", "hospital-07"
ALL = names(7)
SECOND = ATTEMPT.model_copy(update={"attempt": 2})


def refused(code: Code, call: Callable[..., object], *args: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        call(*args)
    assert caught.value.code is code
    return caught.value


def again(consortium: Consortium, signed: Signed, kind: type[Statement], **changes: Any) -> Signed:
    statement = parse(kind, signed.statement).model_copy(update=changes)
    assert statement.speaker is not None
    return sign(statement, consortium.keys[statement.speaker])


# adverts


def test_a_group_is_at_least_t_distinct_adverts_of_the_cohort(begun: Consortium) -> None:
    group = opening.check_group(begun.adverts, begun.roster, ATTEMPT, EPOCH, ALL)
    assert list(group) == ALL
    check = opening.check_group
    refused(Code.PRIVACY_REFUSED, check, begun.adverts[:4], begun.roster, ATTEMPT, EPOCH, ALL)
    refused(Code.STATEMENT_INVALID, check, begun.adverts, begun.roster, ATTEMPT, EPOCH, ALL[:6])
    refused(Code.STATEMENT_INVALID, check, begun.adverts, begun.roster, SECOND, EPOCH, ALL)
    refused(Code.STATEMENT_INVALID, check, [*begun.adverts[:6], begun.adverts[0]], begun.roster, ATTEMPT, EPOCH, ALL)
    copied = again(begun, begun.adverts[1], Advert, mask_key=group[ME].mask_key)
    error = refused(
        Code.STATEMENT_INVALID, check, [begun.adverts[0], copied, *begun.adverts[2:]], begun.roster, ATTEMPT, EPOCH, ALL
    )
    assert error.detail["hospitals"] == f"{ME},{OTHER}"


def test_ages_are_within_the_bound_and_no_older_than_the_first_version(begun: Consortium) -> None:
    """Another hospital's age is checked by the coordinator, and by every hospital of the group."""
    later = ATTEMPT.model_copy(update={"round": 3})
    states = {name: begun.member(name).begin(later, EPOCH, ALL, age=2 * (name == OTHER)) for name in ALL}
    aged, check = states[OTHER].advert, opening.check_advert
    assert check(aged, begun.roster, later, EPOCH, 2).age == 2
    error = refused(Code.STATEMENT_INVALID, check, aged, begun.roster, later, EPOCH, 1)
    assert error.detail["culprit"] == OTHER
    impossible = again(begun, aged, Advert, age=3)
    refused(Code.STATEMENT_INVALID, check, impossible, begun.roster, later, EPOCH, 100)
    group = [state.advert for state in states.values()]
    refused(Code.STATEMENT_INVALID, begun.member(ME).share, states[ME], group)
    assert begun.member(ME).share(states[ME], group, 2).shares_out


# shares


def test_a_dealer_deals_to_everybody_else_exactly_once(shared: Consortium) -> None:
    adverts, dealt = shared.adverts, list(shared.states[ME].shares_out)
    check = opening.check_shares
    assert len(check(dealt, shared.roster, ATTEMPT, adverts, ME)) == 6
    to_itself = again(shared, dealt[0], Share, recipient=ME)
    to_a_stranger = again(shared, dealt[0], Share, recipient="stranger")
    for bad in (dealt[1:], [*dealt, dealt[0]], [dealt[1], *dealt[1:]], [to_itself, *dealt[1:]], [], dealt * 100):
        error = refused(Code.STATEMENT_INVALID, check, bad, shared.roster, ATTEMPT, adverts, ME)
        assert error.detail["culprit"] == ME
    refused(Code.STATEMENT_INVALID, check, [to_a_stranger, *dealt[1:]], shared.roster, ATTEMPT, adverts, ME)
    refused(Code.STATEMENT_INVALID, check, dealt, shared.roster, ATTEMPT, adverts, OTHER)
    refused(Code.STATEMENT_INVALID, check, dealt, shared.roster, ATTEMPT, adverts, "stranger")
    refused(Code.STATEMENT_INVALID, check, dealt, shared.roster, SECOND, adverts, ME)
    refused(Code.STATEMENT_INVALID, check, dealt[:5], shared.roster, ATTEMPT, adverts[:6], ME)
    # Another dealer's share for the same recipient.
    for_third = shared.shares_for(THIRD, [OTHER])
    assert parse(Share, dealt[1].statement).recipient == THIRD
    refused(Code.STATEMENT_INVALID, check, [dealt[0], *for_third, *dealt[2:]], shared.roster, ATTEMPT, adverts, ME)


# uploads and survivors


def upload_of(consortium: Consortium, name: str) -> Signed:
    upload = consortium.states[name].upload
    assert upload is not None
    return upload


def test_an_upload_is_a_sharers_and_for_these_sharers(uploaded: Consortium) -> None:
    good, digest = upload_of(uploaded, ME), adverts_digest(uploaded.adverts)
    check = opening.check_upload
    assert check(good, uploaded.roster, ATTEMPT, digest, ALL).hospital_id == ME
    signers = SigningKeys({ME: uploaded.roster.signing_key(ME)})
    assert check(good, signers, ATTEMPT, digest, ALL[::-1]).hospital_id == ME
    refused(Code.STATEMENT_INVALID, check, good, uploaded.roster, ATTEMPT, digest, ALL[1:])
    refused(Code.STATEMENT_INVALID, check, good, uploaded.roster, ATTEMPT, digest, ALL[:6])
    refused(Code.STATEMENT_INVALID, check, good, uploaded.roster, SECOND, digest, ALL)
    refused(Code.STATEMENT_INVALID, check, good, uploaded.roster, ATTEMPT, HASH, ALL)
    refused(Code.STATEMENT_INVALID, check, good._replace(hospital_id=OTHER), uploaded.roster, ATTEMPT, digest, ALL)
    outside = sign(
        parse(Upload, good.statement).model_copy(update={"hospital_id": LAST, "sharers": sharers_digest(ALL[:6])}),
        uploaded.keys[LAST],
    )
    refused(Code.STATEMENT_INVALID, check, outside, uploaded.roster, ATTEMPT, digest, ALL[:6])
    for complaints in ((ME,), ("stranger",)):
        bad = again(uploaded, good, Upload, complaints=complaints)
        refused(Code.STATEMENT_INVALID, check, bad, uploaded.roster, ATTEMPT, digest, ALL)


def test_a_list_of_survivors_has_everybody_who_uploaded(uploaded: Consortium) -> None:
    uploads = {name: upload_of(uploaded, name) for name in ALL[:6]}
    make, adverts = opening.survivors_statement, uploaded.adverts
    statement = make(uploaded.roster, EPOCH, ATTEMPT, adverts[::-1], ALL[::-1], dict(reversed(uploads.items())))
    assert statement == make(uploaded.roster, EPOCH, ATTEMPT, adverts, ALL, uploads)
    assert parse(Survivors, statement).ids == tuple(ALL[:6])
    assert parse(Survivors, statement).dropped == (LAST,)
    four = {name: uploads[name] for name in ALL[:4]}
    refused(Code.PRIVACY_REFUSED, make, uploaded.roster, EPOCH, ATTEMPT, adverts, ALL, four)
    renamed = {**uploads, LAST: uploads[ME]}
    refused(Code.STATEMENT_INVALID, make, uploaded.roster, EPOCH, ATTEMPT, adverts, ALL, renamed)


def test_only_survivors_confirm(confirmed: Consortium) -> None:
    survivors, check = confirmed.survivors, opening.check_confirmation
    for name in (LAST, "stranger"):
        keys = confirmed.keys.get(name) or MemberKeys.generate(name)
        refused(Code.STATEMENT_INVALID, check, survivors, confirmed.roster, name, sign_bytes(survivors, keys))
    refused(Code.STATEMENT_INVALID, check, survivors, confirmed.roster, ME, confirmed.states[OTHER].confirmation)
    other_roster = Consortium.of(7).roster
    refused(Code.STATEMENT_INVALID, check, survivors, other_roster, ME, confirmed.states[ME].confirmation)


def test_t_survivors_confirm_a_list(confirmed: Consortium) -> None:
    good = {name: confirmed.states[name].confirmation for name in ALL[:6]}
    check = opening.check_confirmed
    assert check(confirmed.survivors, confirmed.roster, good).ids == tuple(ALL[:6])
    four = {name: good[name] for name in ALL[:4]}
    refused(Code.PRIVACY_REFUSED, check, confirmed.survivors, confirmed.roster, four)
    refused(Code.STATEMENT_INVALID, check, confirmed.survivors, confirmed.roster, {**good, ME: bytes(64)})
    everybody = {**good, LAST: sign_bytes(confirmed.survivors, confirmed.keys[LAST])}
    refused(Code.STATEMENT_INVALID, check, confirmed.survivors, confirmed.roster, everybody)


def test_a_list_with_a_sharer_that_is_no_member_is_refused(confirmed: Consortium) -> None:
    good = parse(Survivors, confirmed.survivors)
    bad = good.model_copy(update={"sharers": (*good.sharers, "stranger")}).encode()
    signature = sign_bytes(bad, confirmed.keys[ME])
    refused(Code.STATEMENT_INVALID, opening.check_confirmation, bad, confirmed.roster, ME, signature)


def test_the_listed_uploads_are_found_again(confirmed: Consortium) -> None:
    uploads = [upload_of(confirmed, name) for name in ALL[:6]]
    check = opening.check_listed
    assert sorted(check(confirmed.survivors, confirmed.roster, uploads)) == ALL[:6]
    other = again(confirmed, uploads[0], Upload, ciphertext_sha256="cd" * 32)
    for bad in (uploads[1:], [other, *uploads[1:]], [uploads[1], *uploads[1:]], [*uploads, uploads[0]]):
        refused(Code.STATEMENT_INVALID, check, confirmed.survivors, confirmed.roster, bad)
    forged = uploads[0]._replace(signature=bytes(64))
    refused(Code.STATEMENT_INVALID, check, confirmed.survivors, confirmed.roster, [forged, *uploads[1:]])
    said = parse(Survivors, confirmed.survivors)
    complaining = said.survivors[0].model_copy(update={"complaints": (OTHER,)})
    altered = said.model_copy(update={"survivors": (complaining, *said.survivors[1:])}).encode()
    refused(Code.STATEMENT_INVALID, check, altered, confirmed.roster, uploads)


def test_a_digest_is_a_survivors_over_this_list(revealed: Consortium) -> None:
    state = revealed.member(ME).agree(revealed.states[ME], HASH, bytes(32), HASH)
    assert state.digest is not None
    check = opening.check_digest
    assert check(state.digest, revealed.roster, revealed.survivors).sum_sha256 == HASH
    said = parse(Digest, state.digest.statement)
    for bad, who in (({"survivors": HASH}, ME), ({"attempt": SECOND}, ME), ({"hospital_id": LAST}, LAST)):
        signed = sign(said.model_copy(update=bad), revealed.keys[who])
        refused(Code.STATEMENT_INVALID, check, signed, revealed.roster, revealed.survivors)


# reveals


def reveal_of(consortium: Consortium, name: str) -> Signed:
    reveal = consortium.states[name].reveal
    assert reveal is not None
    return reveal


def changed(revealed: Consortium, name: str, shown: list[RevealedShare]) -> Signed:
    return again(revealed, reveal_of(revealed, name), Reveal, shares=tuple(shown))


def test_a_wrong_share_names_its_holder(revealed: Consortium) -> None:
    shown = list(parse(Reveal, reveal_of(revealed, OTHER).statement).shares)
    for i, share in enumerate(shown):
        if share.of == OTHER:
            continue
        wrong = share.model_copy(update={"share": os.urandom(16).hex()})
        signed = changed(revealed, OTHER, [*shown[:i], wrong, *shown[i + 1 :]])
        error = refused(
            Code.STATEMENT_INVALID,
            opening.check_reveal,
            signed,
            revealed.roster,
            revealed.survivors,
            revealed.shares,
        )
        assert error.detail["culprit"] == OTHER


def test_a_reveal_is_exactly_what_the_list_asks_for(revealed: Consortium) -> None:
    state = revealed.states[OTHER]
    shown = list(parse(Reveal, reveal_of(revealed, OTHER).statement).shares)
    mask_of_me = RevealedShare(of=ME, kind="mask", share=state.shares_in[ME].mask_share.hex())
    self_of_last = RevealedShare(of=LAST, kind="self", share=state.shares_in[LAST].self_share.hex())
    of_nobody = RevealedShare(of="stranger", kind="self", share="00" * 16)
    check = opening.check_reveal
    for bad in (
        shown[1:],
        shown[:-1],
        [mask_of_me, *shown[1:]],
        [*shown[:-1], self_of_last],
        [*shown, of_nobody],
    ):
        signed = changed(revealed, OTHER, bad)
        error = refused(Code.STATEMENT_INVALID, check, signed, revealed.roster, revealed.survivors, revealed.shares)
        assert error.detail["culprit"] == OTHER
    both = changed(revealed, OTHER, [mask_of_me, *shown])
    refused(Code.STATEMENT_INVALID, check, both, revealed.roster, revealed.survivors, revealed.shares)


def test_a_reveal_is_a_survivors_over_this_list(revealed: Consortium) -> None:
    good, check = parse(Reveal, reveal_of(revealed, ME).statement), opening.check_reveal
    for bad, who in (({"survivors": HASH}, ME), ({"attempt": SECOND}, ME), ({"sender": LAST}, LAST)):
        signed = sign(good.model_copy(update=bad), revealed.keys[who])
        refused(Code.STATEMENT_INVALID, check, signed, revealed.roster, revealed.survivors, revealed.shares)
    relabelled = reveal_of(revealed, ME)._replace(hospital_id=OTHER)
    refused(Code.STATEMENT_INVALID, check, relabelled, revealed.roster, revealed.survivors, revealed.shares)


def test_a_reveal_is_held_against_signed_shares_only(revealed: Consortium) -> None:
    dealt = [item for item in revealed.shares if parse(Share, item.statement).recipient == ME]
    check, reveal = opening.check_reveal, reveal_of(revealed, ME)
    check(reveal, revealed.roster, revealed.survivors, dealt)
    refused(Code.STATEMENT_INVALID, check, reveal, revealed.roster, revealed.survivors, dealt[1:])
    forged = [dealt[0]._replace(signature=bytes(64)), *dealt[1:]]
    refused(Code.STATEMENT_INVALID, check, reveal, revealed.roster, revealed.survivors, forged)


# opening


def cheat(consortium: Consortium, dealer: str, kind: str) -> None:
    """Deal shares of one seed that do not lie on any polynomial of degree t - 1, with honest commitments."""
    state = consortium.states[dealer]
    t, n = consortium.roster.threshold, consortium.roster.size
    honest = shares.split(state.self_seed, t, n), shares.split(state.mask_seed, t, n)
    for name in ALL:
        position = consortium.roster.position(name)
        pair = SharePair(honest[0][position], honest[1][position])
        pair = pair._replace(**{f"{kind}_share": os.urandom(16)})
        if name == dealer:
            consortium.states[dealer] = replace(consortium.states[dealer], own_share=pair)
        else:
            consortium.replace_share(consortium.deal(dealer, name, pair))


def opened(consortium: Consortium, revealers: list[str]) -> Opening:
    consortium.receive(ALL)
    consortium.upload(ALL[:6])
    reveals = consortium.reveal(revealers, consortium.confirm())
    return opening.open_masks(consortium.roster, consortium.survivors, consortium.adverts, reveals)


@pytest.mark.parametrize(("dealer", "kind"), [(THIRD, "self"), (LAST, "mask")])
def test_shares_that_do_not_belong_together_name_their_dealer(shared: Consortium, dealer: str, kind: str) -> None:
    cheat(shared, dealer, kind)
    error = refused(Code.STATEMENT_INVALID, opened, shared, ALL[:5])
    assert error.detail["culprit"] == dealer


@pytest.mark.parametrize(("dealer", "kind"), [(THIRD, "mask"), (LAST, "self")])
def test_what_is_never_opened_does_no_harm(shared: Consortium, dealer: str, kind: str) -> None:
    cheat(shared, dealer, kind)
    assert set(opened(shared, ALL[:5]).mask_seeds) == {LAST}


def test_a_lie_about_ones_own_share_names_the_liar_or_does_no_harm(revealed: Consortium) -> None:
    shown = list(parse(Reveal, reveal_of(revealed, ME).statement).shares)
    lie = changed(revealed, ME, [shown[0].model_copy(update={"share": "00" * 16}), *shown[1:]])
    opening.check_reveal(lie, revealed.roster, revealed.survivors, revealed.shares)
    others = [reveal_of(revealed, name) for name in ALL[1:6]]
    roster, survivors, adverts = revealed.roster, revealed.survivors, revealed.adverts
    error = refused(Code.STATEMENT_INVALID, opening.open_masks, roster, survivors, adverts, [lie, *others[:4]])
    assert error.detail["culprit"] == ME
    assert (
        opening.open_masks(roster, survivors, adverts, [lie, *others]).self_seeds[ME] == revealed.states[ME].self_seed
    )


def test_an_opening_has_one_seed_of_every_sharer(revealed: Consortium) -> None:
    reveals = [reveal_of(revealed, name) for name in ALL[:6]]
    found = opening.open_masks(revealed.roster, revealed.survivors, revealed.adverts, reveals[1:])
    assert found.self_seeds == {name: revealed.states[name].self_seed for name in ALL[:6]}
    assert found.mask_seeds == {LAST: revealed.states[LAST].mask_seed}
    assert all(seed.hex() not in repr(found) and repr(seed) not in repr(found) for seed in found.self_seeds.values())


def test_an_opening_is_made_of_t_reveals_and_the_adverts_of_the_list(revealed: Consortium, begun: Consortium) -> None:
    reveals = [reveal_of(revealed, name) for name in ALL[:6]]
    roster, survivors, adverts = revealed.roster, revealed.survivors, revealed.adverts
    refused(Code.WRONG_STATE, opening.open_masks, roster, survivors, adverts, reveals[:4])
    refused(Code.WRONG_STATE, opening.open_masks, roster, survivors, adverts, [])
    refused(Code.STATEMENT_INVALID, opening.open_masks, roster, survivors, adverts, [*reveals[:4], reveals[0]])
    refused(Code.STATEMENT_INVALID, opening.open_masks, roster, survivors, adverts[1:], reveals)
    another = begun.member(ME).begin(ATTEMPT, EPOCH, ALL).advert
    refused(Code.STATEMENT_INVALID, opening.open_masks, roster, survivors, [another, *adverts[1:]], reveals)


# correction


def correction(revealed: Consortium, keys: tuple[MaskKey, ...], survivors: list[str], found: Opening) -> object:
    return opening.correction(ATTEMPT, keys, survivors, found)


def test_a_correction_checks_every_seed(revealed: Consortium) -> None:
    keys = opening.mask_keys(revealed.adverts, revealed.roster, ALL)
    self_seeds: Mapping[str, bytes] = {name: revealed.states[name].self_seed for name in ALL[:6]}
    mask_seeds: Mapping[str, bytes] = {LAST: revealed.states[LAST].mask_seed}
    plan = opening.correction(ATTEMPT, keys, ALL[:6], Opening(self_seeds, mask_seeds))
    assert [sign for _, sign in plan] == [1] * 12

    wrong = os.urandom(16)
    for name in ALL[:6]:
        error = refused(
            Code.STATEMENT_INVALID,
            correction,
            revealed,
            keys,
            ALL[:6],
            Opening({**self_seeds, name: wrong}, mask_seeds),
        )
        assert error.detail["culprit"] == name
    error = refused(Code.STATEMENT_INVALID, correction, revealed, keys, ALL[:6], Opening(self_seeds, {LAST: wrong}))
    assert error.detail["culprit"] == LAST

    fewer = {name: self_seeds[name] for name in ALL[:5]}
    for survivors, found in (
        (ALL[:6], Opening(self_seeds, {})),
        (ALL[:6], Opening(fewer, mask_seeds)),
        (ALL[:6], Opening(self_seeds, {**mask_seeds, ME: revealed.states[ME].mask_seed})),
        (ALL[:5], Opening(self_seeds, mask_seeds)),
        ([*ALL[:6], ME], Opening(self_seeds, mask_seeds)),
        ([*ALL[:6], "stranger"], Opening(self_seeds, mask_seeds)),
        (ALL[:6], Opening({**self_seeds, "stranger": wrong}, mask_seeds)),
    ):
        refused(Code.STATEMENT_INVALID, correction, revealed, keys, survivors, found)
    refused(Code.STATEMENT_INVALID, correction, revealed, (*keys, keys[0]), ALL[:6], Opening(self_seeds, mask_seeds))


def test_a_correction_is_bound_to_its_attempt(revealed: Consortium) -> None:
    keys = opening.mask_keys(revealed.adverts, revealed.roster, ALL)
    found = Opening(
        {name: revealed.states[name].self_seed for name in ALL[:6]}, {LAST: revealed.states[LAST].mask_seed}
    )
    refused(Code.STATEMENT_INVALID, opening.correction, SECOND, keys, ALL[:6], found)


def test_mask_keys_come_from_the_sharers_adverts(revealed: Consortium) -> None:
    keys = opening.mask_keys(revealed.adverts[::-1], revealed.roster, ALL[::-1])
    assert [(key.hospital_id, key.position) for key in keys] == [(name, i) for i, name in enumerate(ALL, start=1)]
    refused(Code.STATEMENT_INVALID, opening.mask_keys, revealed.adverts[1:], revealed.roster, ALL)
    refused(Code.STATEMENT_INVALID, opening.mask_keys, revealed.adverts, revealed.roster, [*ALL, "stranger"])
