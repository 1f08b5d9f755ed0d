"""Whole attempts, from adverts to the exact sum."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Code, FedmeshError
from services.secure_sum import cohort, opening
from services.secure_sum.member import MemberState
from services.secure_sum.opening import Opening
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import Reveal, Upload, parse
from tests.support.secure_sum import Consortium, names


def finish(consortium: Consortium, revealers: list[str], confirmations: dict[str, bytes]) -> Opening:
    reveals = consortium.reveal(revealers, confirmations)
    return opening.open_masks(consortium.roster, consortium.survivors, consortium.adverts, reveals)


def test_fifteen_members_two_leave_after_sharing_and_two_after_uploading() -> None:
    consortium = Consortium.of(15)
    group = names(15)
    consortium.begin(group)
    consortium.share()
    consortium.receive(group)
    uploaders = [name for name in group if name not in ("hospital-03", "hospital-15")]
    consortium.upload(uploaders)
    confirmations = consortium.confirm()
    opened = finish(consortium, uploaders[2:], confirmations)

    assert set(opened.mask_seeds) == {"hospital-03", "hospital-15"}
    np.testing.assert_array_equal(consortium.unmask(opened), consortium.expected())


# One of each size, so that hypothesis spends its time on drop patterns and not on keys.
CONSORTIA = {n: Consortium.of(n) for n in (2, 3, 4, 5, 6, 7)}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_sum_is_exact_whoever_leaves_as_long_as_t_stay(data: st.DataObject) -> None:
    n = data.draw(st.sampled_from(sorted(CONSORTIA)))
    t = cohort.threshold(n)

    def stay(present: list[str], label: str) -> list[str]:
        left = data.draw(st.lists(st.sampled_from(present), unique=True, max_size=len(present) - t), label=label)
        return [name for name in present if name not in left]

    consortium = CONSORTIA[n].again(data.draw(st.integers(1, 9)))
    group = stay(names(n), "never ready")
    consortium.begin(group)
    consortium.share()
    sharers = stay(group, "left before sharing")
    consortium.receive(sharers)
    uploaders = stay(sharers, "left before uploading")
    consortium.upload(uploaders)
    confirmations = consortium.confirm()
    confirmers = stay(uploaders, "left before confirming")
    chosen = {name: confirmations[name] for name in confirmers}
    opened = finish(consortium, stay(uploaders, "left before revealing"), chosen)

    assert opened.mask_seeds.keys() == set(sharers) - set(uploaders)
    np.testing.assert_array_equal(consortium.unmask(opened), consortium.expected())
    for state in consortium.states.values():
        assert MemberState.from_json(state.to_json()) == state


def test_one_reveal_fewer_than_t_opens_nothing(revealed: Consortium) -> None:
    reveals = [state.reveal for state in revealed.states.values() if state.reveal is not None]
    with pytest.raises(FedmeshError) as caught:
        opening.open_masks(revealed.roster, revealed.survivors, revealed.adverts, reveals[:4])
    assert caught.value.code is Code.WRONG_STATE


def test_what_was_uploaded_stays_masked_without_the_opening(uploaded: Consortium) -> None:
    total = sum(uploaded.masked.values(), start=np.zeros(1, dtype=np.uint64)) % np.uint64(1 << 48)
    plain = sum(uploaded.inputs.values(), start=np.zeros(1, dtype=np.uint64)) % np.uint64(1 << 48)
    assert not (total == plain).any()
    for name, masked in uploaded.masked.items():
        assert not (masked == uploaded.inputs[name]).any()


def test_a_bad_share_is_complained_about_and_the_sum_still_opens(shared: Consortium) -> None:
    """The dealer's box for hospital 2 holds something that it did not commit to."""
    bad = SharePair(b"\x01" * 16, b"\x02" * 16)
    shared.replace_share(shared.deal("hospital-01", "hospital-02", bad, committed=SharePair(bytes(16), bytes(16))))
    shared.receive(names(7))
    assert shared.states["hospital-02"].complaints == ("hospital-01",)
    assert shared.states["hospital-03"].complaints == ()
    shared.upload(names(6))
    upload = shared.states["hospital-02"].upload
    assert upload is not None
    assert parse(Upload, upload.statement).complaints == ("hospital-01",)
    confirmations = shared.confirm()
    opened = finish(shared, names(6), confirmations)

    reveal = shared.states["hospital-02"].reveal
    assert reveal is not None
    assert "hospital-01" not in [share.of for share in parse(Reveal, reveal.statement).shares]
    np.testing.assert_array_equal(shared.unmask(opened), shared.expected())


def test_an_attempt_that_could_not_be_opened_is_not_confirmed(shared: Consortium) -> None:
    """With two of six survivors lacking hospital 1's shares, t = 5 are not to be had."""
    for recipient in ("hospital-02", "hospital-03"):
        pair = SharePair(bytes(16), bytes(16))
        shared.replace_share(shared.deal("hospital-01", recipient, pair, box="00" * 60))
    shared.receive(names(7))
    shared.upload(names(6))
    with pytest.raises(FedmeshError) as caught:
        shared.confirm()
    assert caught.value.code is Code.WRONG_STATE
    assert caught.value.detail == {"dealer": "hospital-01"}


def test_more_complaints_than_colluders_prove_that_the_dealer_is_at_fault(shared: Consortium) -> None:
    for recipient in names(4)[1:]:
        pair = SharePair(bytes(16), bytes(16))
        shared.replace_share(shared.deal("hospital-01", recipient, pair, box="00" * 60))
    shared.receive(names(7))
    shared.upload(names(7))
    with pytest.raises(FedmeshError) as caught:
        shared.confirm()
    assert caught.value.detail["culprit"] == "hospital-01"


def test_the_centre_checks_openings_without_numpy_or_tenseal() -> None:
    """Nor with PyCryptodome, which only the tests have."""
    code = (
        "import sys; import services.secure_sum.opening, services.secure_sum.member;"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'tenseal', 'Crypto')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
