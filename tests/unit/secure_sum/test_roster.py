import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum import roster
from services.secure_sum.roster import MemberKeys, Roster, maker_order
from services.secure_sum.statements import RosterMember, RosterStatement, sign_bytes
from tests.support.secure_sum import make_keys, make_roster

KEYS = make_keys(7)
FOUNDING = make_roster(KEYS)
"""n = 7, t = 5."""
NEW = MemberKeys.generate("new")


def refused(code: Code, call: Callable[..., object], *args: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        call(*args)
    assert caught.value.code is code
    return caught.value


def signatures(statement: bytes, keys: list[MemberKeys]) -> dict[str, bytes]:
    return {key.hospital_id: sign_bytes(statement, key) for key in keys}


def publics(keys: list[MemberKeys]) -> list[RosterMember]:
    return [key.public() for key in keys]


def test_a_roster_numbers_its_members_from_one_in_order() -> None:
    statement = roster.found("consortium", publics(KEYS)[::-1])
    found = roster.verify_founding(statement, signatures(statement, KEYS))
    assert found == FOUNDING
    assert found.ids == tuple(key.hospital_id for key in KEYS)
    assert (found.size, found.threshold, found.colluders) == (7, 5, 2)
    assert [found.position(name) for name in found.ids] == [1, 2, 3, 4, 5, 6, 7]
    assert found.signing_key("hospital-02") == KEYS[1].signing.public_key().public_bytes_raw()
    assert found.sealing_key("hospital-02") == KEYS[1].sealing.public_key().public_bytes_raw()
    assert "hospital-02" in found
    assert "stranger" not in found
    for of in (found.position, found.signing_key, found.sealing_key):
        refused(Code.STATEMENT_INVALID, of, "stranger")


def test_every_member_and_nobody_else_signs_the_founding_roster() -> None:
    statement = roster.found("consortium", publics(KEYS))
    good = signatures(statement, KEYS)
    for bad in (
        {name: good[name] for name in list(good)[1:]},
        {},
        {**good, "hospital-01": good["hospital-02"]},
        {**good, "hospital-01": bytes(64)},
        {**good, "new": sign_bytes(statement, NEW)},
    ):
        refused(Code.STATEMENT_INVALID, roster.verify_founding, statement, bad)


def test_members_are_each_there_once_with_keys_of_their_own() -> None:
    listed = publics(KEYS)
    taken = listed[0]
    for bad in (
        [*listed, listed[0]],
        listed[:1],
        [],
        [*listed, RosterMember(hospital_id="new", signing_key=taken.signing_key, sealing_key="09" + "00" * 31)],
        [*listed, RosterMember(hospital_id="new", signing_key="09" * 32, sealing_key=taken.sealing_key)],
        [*listed, RosterMember(hospital_id="new", signing_key="0a" * 32, sealing_key="00" * 32)],
        [*listed, RosterMember(hospital_id="new", signing_key="0a" * 32, sealing_key="0a" * 31 + "ff")],
        [MemberKeys.generate(f"h{i}").public() for i in range(65)],
    ):
        refused(Code.INVALID_ARGUMENT, roster.found, "consortium", bad)
    refused(Code.INVALID_ARGUMENT, roster.found, "not a consortium", listed)


def successor(keys: list[MemberKeys], **changes: Any) -> bytes:
    statement = RosterStatement.model_validate_json(roster.succeed(FOUNDING, publics(keys)))
    return statement.model_copy(update=changes).encode()


def test_t_members_of_the_roster_before_change_it() -> None:
    statement = successor([*KEYS, NEW])
    following = roster.verify_successor(FOUNDING, statement, signatures(statement, KEYS[:5]))
    assert "new" in following
    assert following.statement.version == 2
    assert following.statement.previous == FOUNDING.sha256
    refused(Code.STATEMENT_INVALID, roster.verify_successor, FOUNDING, statement, signatures(statement, KEYS[:4]))
    refused(Code.STATEMENT_INVALID, roster.verify_founding, statement, signatures(statement, [*KEYS, NEW]))


def test_new_members_have_no_say_in_the_roster_that_brings_them() -> None:
    statement = successor([*KEYS, NEW])
    refused(
        Code.STATEMENT_INVALID, roster.verify_successor, FOUNDING, statement, signatures(statement, [*KEYS[:4], NEW])
    )
    refused(
        Code.STATEMENT_INVALID, roster.verify_successor, FOUNDING, statement, signatures(statement, [*KEYS[:5], NEW])
    )


def test_a_removed_member_signs_its_removal_and_nothing_after_it() -> None:
    removal = successor(KEYS[:6])
    roster.sign_roster(removal, KEYS[6])
    second = roster.verify_successor(FOUNDING, removal, signatures(removal, [*KEYS[:4], KEYS[6]]))
    third = roster.succeed(second, publics([*KEYS[:6], NEW]))
    # n = 6, t = 5.
    refused(Code.STATEMENT_INVALID, roster.verify_successor, second, third, signatures(third, [*KEYS[:4], KEYS[6]]))
    refused(Code.STATEMENT_INVALID, roster.verify_successor, second, third, signatures(third, [*KEYS[:5], KEYS[6]]))
    assert roster.verify_successor(second, third, signatures(third, KEYS[:5])).statement.version == 3


def test_a_new_key_of_a_member_does_not_sign_its_own_coming() -> None:
    changed = MemberKeys.generate("hospital-07")
    statement = successor([*KEYS[:6], changed])
    refused(
        Code.STATEMENT_INVALID,
        roster.verify_successor,
        FOUNDING,
        statement,
        signatures(statement, [*KEYS[:4], changed]),
    )
    following = roster.verify_successor(FOUNDING, statement, signatures(statement, [*KEYS[:4], KEYS[6]]))
    assert following.signing_key("hospital-07") == changed.signing.public_key().public_bytes_raw()


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"version": 1, "previous": ""},
        {"previous": "ab" * 32},
        {"consortium": "another"},
    ],
)
def test_a_successor_follows_exactly_this_roster(changes: dict[str, Any]) -> None:
    statement = successor([*KEYS, NEW], **changes)
    refused(Code.STATEMENT_INVALID, roster.verify_successor, FOUNDING, statement, signatures(statement, KEYS))


def test_a_forked_history_does_not_join_again() -> None:
    left, right = successor([*KEYS, NEW]), successor(KEYS[:6])
    on_the_left = roster.verify_successor(FOUNDING, left, signatures(left, KEYS))
    on_the_right = roster.verify_successor(FOUNDING, right, signatures(right, KEYS))
    after_right = roster.succeed(on_the_right, publics(KEYS))
    refused(Code.STATEMENT_INVALID, roster.verify_successor, on_the_left, after_right, signatures(after_right, KEYS))
    refused(Code.STATEMENT_INVALID, roster.verify_successor, on_the_left, right, signatures(right, KEYS))


def test_signatures_of_one_roster_do_not_count_for_another() -> None:
    left, right = successor([*KEYS, NEW]), successor(KEYS[:6])
    refused(Code.STATEMENT_INVALID, roster.verify_successor, FOUNDING, left, signatures(right, KEYS))


def test_nobody_signs_a_roster_with_foreign_keys_under_its_name() -> None:
    statement = successor([*KEYS[:6], MemberKeys.generate("hospital-07")])
    refused(Code.STATEMENT_INVALID, roster.sign_roster, statement, KEYS[6])
    assert roster.sign_roster(statement, KEYS[0]) == sign_bytes(statement, KEYS[0])
    refused(Code.STATEMENT_INVALID, roster.sign_roster, b"{}", KEYS[0])


def test_member_keys_come_back_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "member.json"
    KEYS[0].save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert MemberKeys.load(path).public() == KEYS[0].public()
    assert KEYS[0].signing.private_bytes_raw().hex() not in repr(KEYS[0])
    refused(Code.CONFIG_INVALID, KEYS[1].save, path)
    path.chmod(0o640)
    refused(Code.CONFIG_INVALID, MemberKeys.load, path)
    refused(Code.CONFIG_INVALID, MemberKeys.load, tmp_path / "missing")
    refused(Code.CONFIG_INVALID, KEYS[0].save, tmp_path / "missing" / "member.json")
    path.chmod(0o600)
    path.write_text("{}")
    refused(Code.CONFIG_INVALID, MemberKeys.load, path)


def test_the_founding_roster_comes_back_from_a_file(tmp_path: Path) -> None:
    path, statement = tmp_path / "roster.json", roster.found("consortium", publics(KEYS))
    good = signatures(statement, KEYS)
    refused(Code.STATEMENT_INVALID, roster.save_roster_file, path, statement, {})
    roster.save_roster_file(path, statement, good)
    assert path.stat().st_mode & 0o777 == 0o600
    assert roster.load_roster_file(path) == FOUNDING
    refused(Code.CONFIG_INVALID, roster.save_roster_file, path, statement, good)


def test_a_damaged_roster_file_is_refused(tmp_path: Path) -> None:
    path, statement = tmp_path / "roster.json", roster.found("consortium", publics(KEYS))
    roster.save_roster_file(path, statement, signatures(statement, KEYS))
    content = json.loads(path.read_text())
    first = content["signatures"][0]

    def load(**changes: Any) -> Roster:
        path.write_text(json.dumps({**content, **changes}))
        return roster.load_roster_file(path)

    refused(Code.STATEMENT_INVALID, lambda: load(statement=content["statement"] + " "))
    refused(Code.STATEMENT_INVALID, lambda: load(statement=content["statement"].replace("hospital-01", "hospital-00")))
    refused(Code.STATEMENT_INVALID, lambda: load(signatures=content["signatures"][1:]))
    refused(Code.CONFIG_INVALID, lambda: load(signatures=[*content["signatures"], first]))
    refused(Code.CONFIG_INVALID, lambda: load(more=1))
    refused(Code.CONFIG_INVALID, lambda: roster.load_roster_file(tmp_path / "missing"))


def test_makers_of_epochs_take_turns_in_an_order_that_all_know() -> None:
    orders = {maker_order(FOUNDING, epoch) for epoch in range(1, 20)}
    assert all(sorted(order) == list(FOUNDING.ids) for order in orders)
    assert len(orders) > 10
    assert maker_order(FOUNDING, 1) == maker_order(make_roster(KEYS), 1)
