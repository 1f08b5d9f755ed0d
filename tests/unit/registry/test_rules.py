"""The registry's rules, without store or wire."""

import base64
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from services.common.errors import Code, FedmeshError
from services.common.identity import parse_identity
from services.registry.domain.entities import (
    Contribution,
    Hospital,
    HospitalStatus,
    Job,
    JobStatus,
    KeyEpoch,
    Plan,
    PlanStatus,
    PublishedRoster,
    Round,
)
from services.registry.domain.events import reported_event
from services.registry.domain.lineage import contribution_leaves, contributions_root
from services.registry.domain.rules import (
    due_epoch,
    parse_metrics,
    require_burnt_form,
    require_cohort,
    require_epoch_for,
    require_quorum,
    require_wanted_public_key,
)
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1, DEFAULT
from services.secure_sum.roster import MemberKeys, Roster, as_roster, found
from services.secure_sum.statements import PUBLIC_KEY_BYTES, Box, EpochStatement, Signed, parse
from services.transparency.merkle import leaf_hash, node_hash

AT = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID(int=1)
COORDINATOR = parse_identity("spiffe://consortium.test/service/coordinator")


def names(n: int) -> tuple[str, ...]:
    return tuple(f"h{number:02d}" for number in range(n))


def a_plan(private: bool) -> Plan:
    return Plan("a" * 64, "plan", b"", 2, private, PlanStatus.APPROVED, "alice", "bob", AT)


def a_job(n: int) -> Job:
    return Job(ID, "a" * 64, "plan", False, names(n), JobStatus.RUNNING, "", 2, 0, "", AT, None, "e" * 64, n)


def a_roster(n: int) -> Roster:
    return as_roster(found("consortium.test", [MemberKeys.generate(name).public() for name in names(n)]))


def a_round(n: int, agreeing: int, contributing: int) -> Round:
    contributions = tuple(Contribution(name, "b" * 64) for name in names(contributing))
    seen = names(agreeing)
    finalizer = seen[0] if seen else "h00"
    return Round(ID, 1, 1, contributions, "c" * 64, seen, (), finalizer, (), "d" * 64, "", 1, AT, b"\0" * 32, "f" * 64)


@pytest.mark.parametrize(("n", "needed"), [(2, 2), (3, 3), (4, 3), (5, 4), (9, 7), (15, 11), (16, 11)])
def test_the_quorum_is_two_thirds_of_the_roster_and_one(n: int, needed: int) -> None:
    require_quorum(a_job(n), a_round(n, needed, needed))
    for agreeing, contributing in ((needed - 1, needed), (needed, needed - 1)):
        with pytest.raises(FedmeshError) as caught:
            require_quorum(a_job(n), a_round(n, agreeing, contributing))
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("n", "members", "private", "expected"),
    [
        (1, 2, False, Code.INVALID_ARGUMENT),
        (17, 20, False, Code.INVALID_ARGUMENT),
        (3, 3, True, Code.PRIVACY_REFUSED),
        (2, 2, False, None),
        (2, 3, False, Code.INVALID_ARGUMENT),
        (3, 3, False, None),
        (4, 4, True, None),
        (3, 4, True, None),
        (10, 15, True, Code.INVALID_ARGUMENT),
        (11, 15, True, None),
        (16, 16, True, None),
        (4, 0, True, Code.WRONG_STATE),
        (4, 2, False, Code.INVALID_ARGUMENT),
    ],
)
def test_a_cohort_has_the_threshold_of_its_roster(n: int, members: int, private: bool, expected: Code | None) -> None:
    known = {name: Hospital(name, "", HospitalStatus.ACTIVE, AT) for name in names(n)}
    roster = a_roster(members) if members else None
    if expected is None:
        assert require_cohort(a_plan(private), names(n)[::-1], known, roster) == names(n)
        return
    with pytest.raises(FedmeshError) as caught:
        require_cohort(a_plan(private), names(n), known, roster)
    assert caught.value.code is expected


def test_an_epoch_is_due_at_once_and_then_by_age() -> None:
    published = PublishedRoster(a_roster(4), b"", {}, "", AT)
    day, hour = timedelta(days=1), timedelta(hours=1)
    assert due_epoch(published.published_at, None, [], day, AT + hour) == (1, hour)
    assert due_epoch(published.published_at, None, [], day, AT - hour) == (1, timedelta())
    newest = KeyEpoch(published.roster.sha256, 7, Signed("h00", b"", b""), AT)
    assert due_epoch(published.published_at, newest, [], day, AT + day - hour) == (0, timedelta())
    assert due_epoch(published.published_at, newest, [], day, AT + day) == (8, timedelta())
    assert due_epoch(published.published_at, newest, [], day, AT + day + hour) == (8, hour)


def an_epoch(roster: Roster, public_key: bytes | None) -> KeyEpoch:
    statement = EpochStatement(
        roster=roster.sha256,
        epoch=7,
        maker="h00",
        parameter_set=DEFAULT.name,
        public_key=None if public_key is None else base64.b64encode(public_key).decode(),
        key_sha256="0" * 64,
        content="",
        boxes=tuple(Box(to=name, box="ab") for name in roster.ids),
    )
    return KeyEpoch(roster.sha256, 7, Signed("h00", statement.encode(), b""), AT)


def test_a_plan_with_a_public_key_makes_an_epoch_with_one_due() -> None:
    roster = a_roster(4)
    published = PublishedRoster(roster, b"", {}, "", AT)
    day, hour = timedelta(days=1), timedelta(hours=1)
    without, having = an_epoch(roster, None), an_epoch(roster, bytes(PUBLIC_KEY_BYTES))
    assert due_epoch(published.published_at, without, [], day, AT + 3 * hour, AT + hour) == (8, 2 * hour)
    assert due_epoch(published.published_at, without, [], day, AT + 3 * hour, AT - hour) == (8, 3 * hour)
    assert due_epoch(published.published_at, having, [], day, AT + 3 * hour, AT + hour) == (0, timedelta())
    said = parse(EpochStatement, without.signed.statement)
    require_wanted_public_key(said, None)
    with pytest.raises(FedmeshError, match="needs a public key") as caught:
        require_wanted_public_key(said, AT)
    assert caught.value.code is Code.WRONG_STATE


def test_no_attempt_opens_under_keys_that_cannot_encrypt_for_the_plan() -> None:
    roster = a_roster(4)
    without, having = an_epoch(roster, None), an_epoch(roster, bytes(PUBLIC_KEY_BYTES))
    public = replace(a_plan(private=False), parameter_set=BFV_N4096_Q60_T44_PK_V1.name)
    require_epoch_for(a_plan(private=False), without)
    require_epoch_for(public, having)
    with pytest.raises(FedmeshError, match="key epoch 7 has no public key") as caught:
        require_epoch_for(public, without)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_a_member_whose_standing_changed_makes_an_epoch_due() -> None:
    published = PublishedRoster(a_roster(4), b"", {}, "", AT)
    day, hour = timedelta(days=1), timedelta(hours=1)
    newest = KeyEpoch(published.roster.sha256, 7, Signed("h00", b"", b""), AT)

    def members(*changed: datetime | None) -> list[Hospital]:
        return [Hospital(f"h{n:02d}", "", HospitalStatus.ACTIVE, AT, standing_at=at) for n, at in enumerate(changed)]

    assert due_epoch(published.published_at, newest, members(None, AT - hour, AT), day, AT + hour) == (0, timedelta())
    changed = members(None, AT + hour, AT + 2 * hour)
    assert due_epoch(published.published_at, newest, changed, day, AT + 3 * hour) == (8, 2 * hour)


def test_a_burnt_round_needs_survivors_but_no_agreement() -> None:
    burnt = replace(a_round(4, 0, 3), burnt=True, finalizer="", state_sha256="")
    require_quorum(a_job(4), burnt)
    require_burnt_form(a_job(4), burnt)
    with pytest.raises(FedmeshError):
        require_quorum(a_job(4), replace(burnt, contributions=burnt.contributions[1:]))
    kept = replace(a_job(4), state_sha256="d" * 64)
    require_burnt_form(kept, replace(burnt, state_sha256="d" * 64))
    for changes in ({"state_sha256": "c" * 64}, {"finalizer": "h00"}, {"metrics_json": "{}"}, {"attesting": ("h00",)}):
        with pytest.raises(FedmeshError):
            require_burnt_form(kept, replace(burnt, **changes))


def test_only_survivors_send_digests() -> None:
    with pytest.raises(FedmeshError, match="h03"):
        require_quorum(a_job(4), a_round(4, 4, 3))


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', "[1]", "1", "{", '{"A":1}', '{"a":"1"}', '{"a":1e999}', '{"a":null}']
)
def test_metrics_that_are_not_flat_finite_numbers_are_refused(text: str) -> None:
    with pytest.raises(FedmeshError):
        parse_metrics(text)


def test_metrics_are_numbers_by_name() -> None:
    assert parse_metrics("") == {}
    assert parse_metrics('{"validation_auroc": 0.5, "n": 3}') == {"validation_auroc": 0.5, "n": 3.0}
    with pytest.raises(FedmeshError):
        parse_metrics("{" + ",".join(f'"m{number}":1' for number in range(201)) + "}")


def test_the_root_of_a_round_does_not_depend_on_the_order_told() -> None:
    told = a_round(2, 2, 2)
    turned = replace(told, contributions=told.contributions[::-1])
    assert contributions_root(told) == contributions_root(turned)
    first, second = map(leaf_hash, contribution_leaves(told))
    assert contributions_root(told) == node_hash(first, second).hex()
    assert contributions_root(replace(told, attempt=2)) != contributions_root(told)


def test_a_reported_event_is_spelled_canonically_and_names_its_reporter() -> None:
    event = reported_event(ID, "round.sealed", AT, str(COORDINATOR), f"job/{ID}", '{ "b": 1, "a": [1.0] }', COORDINATOR)
    assert event.body_json == '{"a":[1.0],"b":1,"recorded_for":"spiffe://consortium.test/service/coordinator"}'


@pytest.mark.parametrize("event_type", ["round.sealed\n", "round", "Round.sealed", "round..sealed", "a." + "b" * 63])
def test_the_type_of_an_event_is_a_dotted_name(event_type: str) -> None:
    with pytest.raises(FedmeshError):
        reported_event(ID, event_type, AT, str(COORDINATOR), f"job/{ID}", "{}", COORDINATOR)
