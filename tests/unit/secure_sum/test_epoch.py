import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, epoch, secret
from services.secure_sum.epoch import EpochKeys
from services.secure_sum.public_key import PublicKey
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import Box, EpochStatement, Signed, parse, sign
from tests.support.secure_sum import HASH, make_keys, make_roster

KEYS = make_keys(4)
ROSTER = make_roster(KEYS)
MAKER = KEYS[0]


@pytest.fixture(scope="module")
def published() -> tuple[EpochKeys, Signed]:
    return epoch.make_epoch(MAKER, ROSTER, 3)


def refused(code: Code, call: Callable[..., object], *args: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        call(*args)
    assert caught.value.code is code
    return caught.value


def again(signed: Signed, keys: MemberKeys = MAKER, **changes: Any) -> Signed:
    return sign(parse(EpochStatement, signed.statement).model_copy(update=changes), keys)


def test_every_member_opens_the_same_keys(published: tuple[EpochKeys, Signed]) -> None:
    made, signed = published
    assert all(epoch.open_epoch(signed, keys, ROSTER) == made for keys in KEYS)
    assert (made.roster, made.epoch) == (ROSTER.sha256, 3)
    assert secret.group_key_parameters(made.group_key).name == parse(EpochStatement, signed.statement).parameter_set
    assert len(made.state_key) == 32
    assert len(signed.statement) < 256 * 1024


def test_keys_are_fresh_and_not_in_the_statement_or_on_show(published: tuple[EpochKeys, Signed]) -> None:
    made, signed = published
    other, _ = epoch.make_epoch(MAKER, ROSTER, 3)
    assert other.state_key != made.state_key
    assert other.group_key != made.group_key
    content = parse(EpochStatement, signed.statement).content_bytes()
    for key in (made.state_key, made.group_key[-64:]):
        assert key.hex().encode() not in signed.statement
        assert key not in content
        assert key.hex() not in repr(made)
        assert repr(key) not in repr(made)


def test_who_is_not_a_member_neither_makes_nor_opens(published: tuple[EpochKeys, Signed]) -> None:
    _, signed = published
    stranger = MemberKeys.generate("stranger")
    refused(Code.STATEMENT_INVALID, epoch.make_epoch, stranger, ROSTER, 3)
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, signed, stranger, ROSTER)
    impostor = MemberKeys.generate("hospital-02")
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, signed, impostor, ROSTER)
    forged = again(signed, stranger, maker="stranger")
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, forged, KEYS[1], ROSTER)
    taken_over = sign(parse(EpochStatement, signed.statement).model_copy(update={"maker": "hospital-02"}), KEYS[1])
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, taken_over, KEYS[2], ROSTER)


def test_a_members_box_is_its_own(published: tuple[EpochKeys, Signed]) -> None:
    _, signed = published
    thief = replace(KEYS[1], hospital_id="hospital-03")
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, signed, thief, ROSTER)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 4},
        {"roster": HASH},
        {"parameter_set": "another"},
        {"key_sha256": HASH},
        {"content": ""},
        {"content": base64.b64encode(bytes(100)).decode()},
    ],
)
def test_a_statement_that_says_something_else_does_not_open(
    published: tuple[EpochKeys, Signed], changes: dict[str, Any]
) -> None:
    error = refused(Code.STATEMENT_INVALID, epoch.open_epoch, again(published[1], **changes), KEYS[1], ROSTER)
    assert error.detail["culprit"] == MAKER.hospital_id


def test_every_box_and_the_content_are_authenticated(published: tuple[EpochKeys, Signed]) -> None:
    _, signed = published
    statement = parse(EpochStatement, signed.statement)
    boxes = list(statement.boxes)
    good = bytes.fromhex(boxes[1].box)
    assert len(good) == 92
    for i in (0, 31, 32, 43, 44, 75, 91):
        bad = good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]
        changed = (boxes[0], Box(to=boxes[1].to, box=bad.hex()), *boxes[2:])
        refused(Code.STATEMENT_INVALID, epoch.open_epoch, again(signed, boxes=changed), KEYS[1], ROSTER)
    for bad in (bytes(32) + good[32:], good[:91], good + b"\0", b"\0"):
        changed = (boxes[0], Box(to=boxes[1].to, box=bad.hex()), *boxes[2:])
        refused(Code.STATEMENT_INVALID, epoch.open_epoch, again(signed, boxes=changed), KEYS[1], ROSTER)
    content = statement.content_bytes()
    for i in (0, 11, 12, 44, len(content) - 1):
        bad = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        changed_content = base64.b64encode(bad).decode()
        refused(Code.STATEMENT_INVALID, epoch.open_epoch, again(signed, content=changed_content), KEYS[1], ROSTER)


def test_members_that_are_suspended_get_no_box(published: tuple[EpochKeys, Signed]) -> None:
    assert ROSTER.threshold == len(KEYS) - 1
    out = KEYS[-1]
    assert out is not MAKER
    made, signed = epoch.make_epoch(MAKER, ROSTER, 3, without=[out.hospital_id])
    assert all(epoch.open_epoch(signed, keys, ROSTER) == made for keys in KEYS[:-1])
    assert out.hospital_id not in {box.to for box in parse(EpochStatement, signed.statement).boxes}
    refused(Code.WRONG_STATE, epoch.open_epoch, signed, out, ROSTER)
    refused(Code.PRIVACY_REFUSED, lambda: epoch.make_epoch(MAKER, ROSTER, 3, without=ROSTER.ids))


def test_boxes_are_for_at_least_t_members_and_the_maker(published: tuple[EpochKeys, Signed]) -> None:
    _, signed = published
    boxes = parse(EpochStatement, signed.statement).boxes
    extra = Box(to="stranger", box=boxes[0].box)
    without_maker = tuple(box for box in boxes if box.to != MAKER.hospital_id)
    for bad in (boxes[:2], without_maker, (*boxes, extra), (*boxes[:3], extra)):
        refused(Code.STATEMENT_INVALID, epoch.check_epoch, again(signed, boxes=bad), ROSTER)
    refused(Code.STATEMENT_INVALID, epoch.check_epoch, signed, make_roster(KEYS[:3]))
    refused(Code.STATEMENT_INVALID, epoch.check_epoch, again(signed, roster=HASH), ROSTER)


def craft(state_key: bytes, group_key: bytes, said: str | None = None, public: bytes = b"") -> Signed:
    """What a maker could publish that encrypts properly but not what it should."""
    context_keys = EpochKeys(ROSTER.sha256, 3, group_key, state_key, "")
    digest = said or epoch._digest(ROSTER.sha256, 3, state_key, group_key, public)
    params = "bfv-n4096-q60-t48-v2"
    context = epoch._context(ROSTER.sha256, 3, MAKER.hospital_id, params, digest)
    content_key = bytes(32)
    content = bytes(12) + AESGCM(content_key).encrypt(bytes(12), state_key + context_keys.group_key, context)
    boxes = tuple(
        Box(to=name, box=epoch._seal(content_key, ROSTER.sealing_key(name), context, name).hex()) for name in ROSTER.ids
    )
    statement = EpochStatement(
        roster=ROSTER.sha256,
        epoch=3,
        maker=MAKER.hospital_id,
        parameter_set=params,
        public_key=base64.b64encode(public).decode() if public else None,
        key_sha256=digest,
        content=base64.b64encode(content).decode(),
        boxes=boxes,
    )
    return sign(statement, MAKER)


def test_keys_that_are_not_what_the_maker_signed_for_name_the_maker(published: tuple[EpochKeys, Signed]) -> None:
    made, _ = published
    assert epoch.open_epoch(craft(made.state_key, made.group_key), KEYS[1], ROSTER) == made
    for bad in (
        craft(made.state_key, made.group_key, HASH),
        craft(made.state_key, made.group_key[:-1]),
        craft(made.state_key, b""),
        craft(made.state_key, b"FMGK" + bytes(len(made.group_key) - 4)),
        craft(b"", b""),
    ):
        error = refused(Code.STATEMENT_INVALID, epoch.open_epoch, bad, KEYS[1], ROSTER)
        assert error.detail["culprit"] == MAKER.hospital_id


def test_keys_come_back_from_bytes_and_damage_is_noticed(published: tuple[EpochKeys, Signed]) -> None:
    made, _ = published
    data = made.to_bytes()
    assert EpochKeys.from_bytes(data) == made
    for i in (0, 5, 10, 20, 60, 100, len(data) - 1):
        bad = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        refused(Code.DATA_INVALID, EpochKeys.from_bytes, bad)
    for bad in (b"", data[:50], data[:-1]):
        refused(Code.DATA_INVALID, EpochKeys.from_bytes, bad)


def test_a_retired_epoch_keeps_its_state_key_only(published: tuple[EpochKeys, Signed]) -> None:
    made, _ = published
    retired = made.without_group_key()
    assert retired.group_key == b""
    assert (retired.state_key, retired.sha256, retired.epoch) == (made.state_key, made.sha256, made.epoch)
    assert EpochKeys.from_bytes(retired.to_bytes()) == retired
    assert made.group_key[-64:] not in retired.to_bytes()


def test_a_roster_of_another_consortium_does_not_open(published: tuple[EpochKeys, Signed]) -> None:
    other: Roster = make_roster(make_keys(4))
    refused(Code.STATEMENT_INVALID, epoch.open_epoch, published[1], KEYS[1], other)


@pytest.fixture(scope="module")
def public() -> tuple[EpochKeys, Signed]:
    return epoch.make_epoch(MAKER, ROSTER, 3, public=True)


def test_an_epoch_with_a_public_key_is_opened_kept_and_retired(public: tuple[EpochKeys, Signed]) -> None:
    made, signed = public
    assert all(epoch.open_epoch(signed, keys, ROSTER) == made for keys in KEYS)
    assert len(signed.statement) < EpochStatement.MAX_BYTES - 64 * 300, "with as many members as there may be too"
    data = made.to_bytes()
    assert EpochKeys.from_bytes(data) == made
    for i in (5, 60, 100, 20_000, len(data) - 1):
        refused(Code.DATA_INVALID, EpochKeys.from_bytes, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
    refused(Code.DATA_INVALID, EpochKeys.from_bytes, data[: len(data) - len(made.group_key)])
    retired = made.without_group_key()
    assert (retired.group_key, retired.public_key) == (b"", None)
    assert EpochKeys.from_bytes(retired.to_bytes()) == retired
    refused(Code.WRONG_STATE, retired.require_public_key)


def test_the_public_key_is_in_the_clear_for_whoever_only_encrypts(public: tuple[EpochKeys, Signed]) -> None:
    made, signed = public
    said = epoch.check_epoch(signed, ROSTER)
    assert PublicKey.from_bytes(said.public_key_bytes()) == made.require_public_key()


def test_an_epoch_without_a_public_key_is_spelled_and_hashed_as_before_there_were_any(
    published: tuple[EpochKeys, Signed],
) -> None:
    made, signed = published
    assert set(json.loads(signed.statement)) == {
        "boxes", "content", "epoch", "key_sha256", "maker", "parameter_set", "roster", "type",
    }  # fmt: skip
    keys = (made.state_key, made.group_key)
    assert made.sha256 == derive.digest(b"fedmesh epoch keys v1", ROSTER.sha256, "3", *keys).hex()
    assert made.to_bytes()[4:6] == b"\0\1"
    error = refused(Code.WRONG_STATE, made.require_public_key)
    assert "has no public key" in error.message


def test_a_public_key_that_does_not_fit_names_the_maker(
    public: tuple[EpochKeys, Signed], published: tuple[EpochKeys, Signed]
) -> None:
    made, signed = public
    other = secret.make_public_key(secret.generate_group_key())
    foreign = base64.b64encode(other.data).decode()
    not_below_q = base64.b64encode(b"\xff" * len(other.data)).decode()
    crafted = [craft(made.state_key, made.group_key, public=key) for key in (other.data, b"\xff" * len(other.data))]
    moved = [again(signed, public_key=key) for key in (None, foreign, not_below_q)]
    for bad in (*crafted, *moved, again(published[1], public_key=foreign)):
        error = refused(Code.STATEMENT_INVALID, epoch.open_epoch, bad, KEYS[1], ROSTER)
        assert error.detail["culprit"] == MAKER.hospital_id


@pytest.mark.parametrize("key", ["", "AA==", "=", "\u00e4"])
def test_a_public_key_of_another_length_is_no_statement(public: tuple[EpochKeys, Signed], key: str) -> None:
    refused(Code.STATEMENT_INVALID, epoch.check_epoch, again(public[1], public_key=key), ROSTER)
