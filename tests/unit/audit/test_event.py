"""What an event may be, and the bytes that it becomes."""

import json
from dataclasses import replace

import pytest

from services.audit.domain.event import MAX_BODY_BYTES, Event, make_leaf
from services.common.errors import Code, FedmeshError
from services.common.identity import parse_identity
from services.transparency.canonical import MAX_DEPTH, parse_canonical

REGISTRY = parse_identity("spiffe://consortium.test/service/registry")
COORDINATOR = parse_identity("spiffe://consortium.test/service/coordinator")
EVENT = Event(
    event_id="0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f1",
    type="round.committed",
    occurred_at="2026-01-02T03:04:05.600Z",
    actor="spiffe://consortium.test/service/coordinator",
    subject="job/17",
    body_json='{"version": 3, "epsilon": 0.5, "hospitals": ["a", "b"]}',
)


def problem(event: Event) -> str:
    with pytest.raises(FedmeshError) as caught:
        make_leaf(event, REGISTRY)
    assert caught.value.code is Code.INVALID_ARGUMENT
    return caught.value.message


def test_the_leaf_is_canonical_and_complete() -> None:
    assert make_leaf(EVENT, REGISTRY).content == (
        b'{"actor":"spiffe://consortium.test/service/coordinator",'
        b'"body":{"epsilon":0.5,"hospitals":["a","b"],"version":3},'
        b'"event_id":"0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f1","occurred_at":"2026-01-02T03:04:05.600Z",'
        b'"source":"spiffe://consortium.test/service/registry","subject":"job/17","type":"round.committed"}'
    )


@pytest.mark.parametrize(
    "body",
    [{}, {"": {"": []}}, {"b": '\u00e9\u2028"\\\n', "a": [True, None, -1, 1e-6]}, {"body": {"actor": "x", "type": 1}}],
)
def test_a_leaf_that_is_put_together_is_canonical(body: dict[str, object]) -> None:
    leaf = parse_canonical(make_leaf(replace(EVENT, body_json=json.dumps(body)), REGISTRY).content)
    assert leaf == {
        "actor": EVENT.actor,
        "body": body,
        "event_id": EVENT.event_id,
        "occurred_at": EVENT.occurred_at,
        "source": str(REGISTRY),
        "subject": EVENT.subject,
        "type": EVENT.type,
    }


def test_a_body_leaves_one_level_of_nesting_to_the_leaf() -> None:
    deepest = '{"a":' * (MAX_DEPTH - 2) + "1" + "}" * (MAX_DEPTH - 2)
    parse_canonical(make_leaf(replace(EVENT, body_json=deepest), REGISTRY).content)
    assert "deeper" in problem(replace(EVENT, body_json='{"a":' + deepest + "}"))


def test_one_event_has_one_leaf_however_its_body_is_spelled() -> None:
    spelled = replace(EVENT, body_json=json.dumps(json.loads(EVENT.body_json), indent=3, sort_keys=True))
    assert make_leaf(spelled, REGISTRY) == make_leaf(EVENT, REGISTRY)
    assert make_leaf(EVENT, COORDINATOR) != make_leaf(EVENT, REGISTRY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event_id", "17"),
        ("event_id", EVENT.event_id.upper()),
        ("type", ""),
        ("type", "committed"),
        ("type", "Round.Committed"),
        ("type", "round.committed\n"),
        ("type", "a." + "b" * 100),
        ("actor", ""),
        ("actor", "somebody else"),
        ("subject", "job/\u0661"),
        ("subject", "x" * 301),
        ("body_json", ""),
        ("body_json", "[1]"),
        ("body_json", "{"),
        ("body_json", '{"a":NaN}'),
        ("body_json", '{"a":1,"a":2}'),
        ("body_json", '{"a":"\\ud800"}'),
        ("body_json", '{"a":' * 100_000),
    ],
)
def test_malformed_events_are_refused(field: str, value: str) -> None:
    assert problem(replace(EVENT, **{field: value}))


def test_bodies_are_limited_as_sent_and_as_kept() -> None:
    make_leaf(replace(EVENT, body_json=json.dumps({"a": "x" * (MAX_BODY_BYTES - 100)})), REGISTRY)
    assert "65536 bytes" in problem(replace(EVENT, body_json=json.dumps({"a": "x" * MAX_BODY_BYTES})))
    # Two bytes as sent, six as kept.
    grown = json.dumps({"a": "\u00e9" * (MAX_BODY_BYTES // 3)}, ensure_ascii=False)
    assert "65536 bytes" in problem(replace(EVENT, body_json=grown))


@pytest.mark.parametrize(
    "key", ["patient_nbr", "patient_id", "encounter_id", "name", "ssn", "dob", "mrn", "Patient-ID", "dateOfBirth"]
)
def test_personal_data_is_refused_at_any_depth(key: str) -> None:
    for body in ({key: 1}, {"rows": [{"values": {key: None}}]}):
        assert "persons" in problem(replace(EVENT, body_json=json.dumps(body)))


def test_ordinary_facts_pass() -> None:
    body = {"plan_name": "readmission-logistic", "patients": 10, "hospital_id": "h01", "delta": 1e-6, "reason": None}
    assert json.loads(make_leaf(replace(EVENT, body_json=json.dumps(body)), REGISTRY).content)["body"] == body
