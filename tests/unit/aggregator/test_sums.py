import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.aggregator.domain.openings import inputs_digest, plan_of
from services.aggregator.domain.sums import AttemptId, Contribution, Form, Opened, State, Sum, require_openable
from services.common.errors import Code, FedmeshError
from services.secure_sum.opening import MaskKey, Opening
from services.secure_sum.parameters import DEFAULT

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SOON = NOW + timedelta(hours=1)
ATTEMPT = AttemptId("f1d2c3b4-0000-4000-8000-000000000000", 1, 1)
FORM = Form(DEFAULT.name, 2, 2049)
GROUP = ("h1", "h2", "h3")
OPENED = Opened(FORM, GROUP, {name: bytes([number]) * 32 for number, name in enumerate(GROUP)}, "ab" * 32)


def held(state: State = State.OPEN) -> Sum:
    return Sum(ATTEMPT, OPENED, state, NOW, contributions={"h1": Contribution("aa", "ss", "blob")})


@pytest.mark.parametrize("state", list(State))
def test_the_same_upload_is_known_and_others_refused(state: State) -> None:
    assert held(state).counted("h1", "aa", "ss")
    for other in (("bb", "ss"), ("aa", "tt")):
        with pytest.raises(FedmeshError) as caught:
            held(state).counted("h1", *other)
        assert caught.value.code is Code.ALREADY_CONTRIBUTED


def test_new_uploads_are_taken_only_of_members_and_only_while_open() -> None:
    assert not held().counted("h2", "aa", "ss")
    for state in (State.CLOSED, State.COMPUTED):
        with pytest.raises(FedmeshError) as closed:
            held(state).counted("h2", "aa", "ss")
        assert closed.value.code is Code.WRONG_STATE
    with pytest.raises(FedmeshError) as stranger:
        held().counted("h9", "aa", "ss")
    assert stranger.value.code is Code.PERMISSION_DENIED


def test_the_form_decides_the_size() -> None:
    size = require_openable(OPENED, SOON, NOW)
    assert size == FORM.layout.upload_bytes
    one_lane = dataclasses.replace(OPENED, form=Form(DEFAULT.name, 1, 2049))
    assert size < require_openable(one_lane, SOON, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"group": ("h2", "h1", "h3")},
        {"group": ("h1",), "signers": {"h1": bytes(32)}},
        {"group": ("h1", "h1", "h2")},
        {"signers": {"h1": bytes(32), "h2": bytes(32)}},
        {"signers": {**OPENED.signers, "h4": bytes(32)}},
        {"signers": {**OPENED.signers, "h3": bytes(31)}},
        {"form": Form("ckks", 2, 2049)},
        {"form": Form(DEFAULT.name, 3, 2049)},
        {"form": Form(DEFAULT.name, 2, 0)},
    ],
)
def test_a_sum_is_not_opened_badly(changes: dict[str, Any]) -> None:
    with pytest.raises(FedmeshError) as caught:
        require_openable(dataclasses.replace(OPENED, **changes), SOON, NOW)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("expires_at", [NOW, NOW - timedelta(seconds=1), NOW + timedelta(days=7, seconds=1)])
def test_a_sum_lives_for_a_while(expires_at: datetime) -> None:
    with pytest.raises(FedmeshError) as caught:
        require_openable(OPENED, expires_at, NOW)
    assert caught.value.code is Code.INVALID_ARGUMENT


KEYS = [MaskKey(name, position, bytes(32), bytes(32)) for position, name in enumerate(GROUP, 1)]


@pytest.mark.parametrize(
    ("state", "survivors", "keys", "code"),
    [
        (State.OPEN, ["h1"], KEYS, Code.WRONG_STATE),
        (State.CLOSED, [], KEYS, Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1", "h1"], KEYS, Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1", "h2"], KEYS, Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1"], KEYS[:2], Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1"], KEYS[::-1], Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1"], [*KEYS, KEYS[0]], Code.INVALID_ARGUMENT),
        (State.CLOSED, ["h1"], KEYS, Code.STATEMENT_INVALID),
    ],
)
def test_a_sum_is_not_computed_from_anything_else(
    state: State, survivors: list[str], keys: list[MaskKey], code: Code
) -> None:
    with pytest.raises(FedmeshError) as caught:
        plan_of(held(state), survivors, keys, Opening({}, {}))
    assert caught.value.code is code


def test_other_inputs_have_another_name() -> None:
    base = inputs_digest(["h1", "h2"], ((b"k" * 32, 1),))
    assert base == inputs_digest(["h1", "h2"], ((b"k" * 32, 1),))
    others = [
        inputs_digest(["h1", "h3"], ((b"k" * 32, 1),)),
        inputs_digest(["h1"], ((b"k" * 32, 1),)),
        inputs_digest(["h1", "h2"], ((b"k" * 32, -1),)),
        inputs_digest(["h1", "h2"], ((b"l" * 32, 1),)),
    ]
    assert len({base, *others}) == 5
