from datetime import UTC, datetime, timedelta

import pytest

from services.aggregator.addition import Addition, parse_addition
from services.aggregator.domain.sums import AttemptId, Form, State, Sum, require_openable
from services.common.errors import Code, FedmeshError
from services.secure_sum.parameters import DEFAULT

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ATTEMPT = AttemptId("f1d2c3b4-0000-4000-8000-000000000000", 1, 1)
FORM = Form(DEFAULT.name, 2, 2049)


def held(state: State = State.OPEN) -> Sum:
    return Sum(ATTEMPT, FORM, ("h1", "h2", "h3"), state, NOW, contributions={"h1": "aa"})


@pytest.mark.parametrize("state", [State.OPEN, State.CLOSED])
def test_the_same_bytes_are_known_and_others_refused(state: State) -> None:
    assert held(state).counted("h1", "aa")
    with pytest.raises(FedmeshError) as caught:
        held(state).counted("h1", "bb")
    assert caught.value.code is Code.ALREADY_CONTRIBUTED


def test_new_bytes_are_taken_only_of_members_and_only_while_open() -> None:
    assert not held().counted("h2", "aa")
    with pytest.raises(FedmeshError) as closed:
        held(State.CLOSED).counted("h2", "aa")
    assert closed.value.code is Code.WRONG_STATE
    with pytest.raises(FedmeshError) as stranger:
        held().counted("h9", "aa")
    assert stranger.value.code is Code.PERMISSION_DENIED


def test_the_form_decides_the_size() -> None:
    size = require_openable(FORM, ("h1", "h2"), NOW + timedelta(hours=1), NOW)
    assert size == FORM.upload_bytes
    assert size < require_openable(Form(DEFAULT.name, 1, 2049), ("h1", "h2"), NOW + timedelta(hours=1), NOW)


@pytest.mark.parametrize("answer", [b"", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00[]", b"\x01\x00\x00\x00{"])
def test_a_senseless_answer_of_a_worker_is_no_addition(answer: bytes) -> None:
    with pytest.raises(FedmeshError) as caught:
        parse_addition(answer)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_an_addition_without_refusals() -> None:
    assert parse_addition(b"\x02\x00\x00\x00{}sum") == Addition(b"sum", {})
