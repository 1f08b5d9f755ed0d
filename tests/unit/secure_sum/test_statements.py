import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from services.common.errors import Code, FedmeshError
from services.secure_sum.statements import (
    Advert,
    Box,
    Digest,
    EpochStatement,
    Reveal,
    RevealedShare,
    Share,
    Signed,
    SigningKeys,
    Statement,
    Survivor,
    Survivors,
    Upload,
    adverts_digest,
    open_signed,
    parse,
    sharers_digest,
    sign,
    verify,
)
from tests.support.secure_sum import ATTEMPT, HASH, make_keys, make_roster

KEYS = make_keys(4)
ROSTER = make_roster(KEYS)
ID = "hospital-01"
ADVERT = Advert(
    roster=ROSTER.sha256,
    epoch=1,
    attempt=ATTEMPT,
    hospital_id=ID,
    mask_key="01" * 32,
    transport_key="02" * 32,
    seed_commitment="03" * 32,
)
SURVIVORS = Survivors(
    roster=ROSTER.sha256,
    epoch=1,
    attempt=ATTEMPT,
    adverts=HASH,
    sharers=ROSTER.ids,
    survivors=tuple(Survivor(hospital_id=name, upload=HASH) for name in ROSTER.ids),
)
REVEAL = Reveal(
    attempt=ATTEMPT,
    survivors=HASH,
    sender=ID,
    shares=tuple(RevealedShare(of=name, kind="self", share="00" * 16) for name in ROSTER.ids),
)
UPLOAD = Upload(
    attempt=ATTEMPT,
    adverts=HASH,
    hospital_id=ID,
    parameter_set="bfv-n4096-q60-t48-v2",
    lanes=2,
    vector_length=10,
    sharers=HASH,
    complaints=(),
    ciphertext_sha256=HASH,
    segments=(HASH,),
)
SHARE = Share(
    attempt=ATTEMPT,
    adverts=HASH,
    sender=ID,
    recipient="hospital-02",
    box="00" * 60,
    self_commitment=HASH,
    mask_commitment=HASH,
)
DIGEST = Digest(attempt=ATTEMPT, survivors=HASH, hospital_id=ID, sum_sha256=HASH, digest=HASH, next_state_sha256=HASH)
EPOCH = EpochStatement(
    roster=HASH,
    epoch=1,
    maker=ID,
    parameter_set="p",
    key_sha256=HASH,
    content="+/8=",
    boxes=(Box(to="a", box="00"), Box(to="b", box="00")),
)
ALL: list[Statement] = [ROSTER.statement, EPOCH, ADVERT, SHARE, UPLOAD, SURVIVORS, REVEAL, DIGEST]


def refused(kind: type[Statement], spelling: bytes) -> None:
    with pytest.raises(FedmeshError) as caught:
        parse(kind, spelling)
    assert caught.value.code is Code.STATEMENT_INVALID


def spell(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("statement", ALL, ids=lambda item: item.type)
def test_a_statement_reads_back_and_is_no_other_type(statement: Statement) -> None:
    spelling = statement.encode()
    assert parse(type(statement), spelling) == statement
    for other in ALL:
        if other is not statement:
            refused(type(other), spelling)


@pytest.mark.parametrize("statement", ALL, ids=lambda item: item.type)
def test_only_the_canonical_spelling_is_accepted(statement: Statement) -> None:
    spelling = statement.encode()
    value = json.loads(spelling)
    kind = type(statement)
    refused(kind, json.dumps(value, sort_keys=True).encode())
    refused(kind, json.dumps(dict(reversed(value.items())), separators=(",", ":")).encode())
    refused(kind, b" " + spelling)
    refused(kind, spelling + b"\n")
    refused(kind, b"\xef\xbb\xbf" + spelling)
    refused(kind, spelling[:-1] + b',"type":' + json.dumps(value["type"]).encode() + b"}")
    refused(kind, spell({**value, "more": 1}))
    for name in value:
        refused(kind, spell({key: item for key, item in value.items() if key != name}))
        refused(kind, spell({**value, name: None}))
        refused(kind, spell({**value, name: [value[name]]}))


@pytest.mark.parametrize("statement", ALL, ids=lambda item: item.type)
def test_canonical_is_what_json_writes_with_sorted_keys_and_no_spaces(statement: Statement) -> None:
    assert statement.encode() == spell(json.loads(statement.model_dump_json()))
    # `parse` relies on it.
    assert to_json(parse(type(statement), statement.encode())) == statement.encode()


def test_fields_are_declared_in_the_order_of_their_spelling() -> None:
    with pytest.raises(TypeError):

        class Unsorted(Statement):
            b: str
            a: str


def test_a_statement_of_another_type_is_called_that() -> None:
    with pytest.raises(FedmeshError) as caught:
        parse(Advert, SHARE.encode())
    assert caught.value.message == "this is no advert statement: type: Input should be 'advert'"


def test_the_spelling_of_a_statement_never_changes() -> None:
    """Signatures that were made before are over these bytes."""
    signed = Upload(
        attempt=ATTEMPT.model_copy(update={"job_id": "j"}),
        adverts=HASH,
        hospital_id="b",
        parameter_set="p",
        lanes=1,
        vector_length=2,
        sharers=HASH,
        complaints=("a", "c"),
        ciphertext_sha256=HASH,
        segments=(HASH,),
    ).encode()
    assert signed.replace(HASH.encode(), b"#") == (
        b'{"adverts":"#","attempt":{"attempt":1,"job_id":"j","round":1},"ciphertext_sha256":"#","complaints":["a","c"],'
        b'"hospital_id":"b","lanes":1,"parameter_set":"p","segments":["#"],"sharers":"#","type":"upload",'
        b'"vector_length":2}'
    )


@given(st.binary(max_size=200))
def test_anything_else_is_refused(data: bytes) -> None:
    refused(Advert, data)


@given(st.data())
def test_one_changed_byte_is_another_statement_or_none(data: st.DataObject) -> None:
    spelling = bytearray(ADVERT.encode())
    at = data.draw(st.integers(0, len(spelling) - 1))
    spelling[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FedmeshError):
        changed = parse(Advert, bytes(spelling))
        assert changed != ADVERT
        assert changed.encode() == bytes(spelling)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_key": "AB" * 32},
        {"mask_key": "ab" * 31},
        {"mask_key": "ab" * 33},
        {"mask_key": "ab" * 31 + "a\n"},
        {"mask_key": "ab" * 32 + "\n"},
        {"mask_key": "\uff10" * 64},
        {"epoch": 0},
        {"epoch": -1},
        {"epoch": 1.0},
        {"epoch": "1"},
        {"epoch": True},
        {"epoch": 1 << 31},
        {"epoch": 1 << 70},
        {"hospital_id": "Hospital-01"},
        {"hospital_id": ""},
        {"hospital_id": "a" * 64},
        {"hospital_id": "ä"},
        {"attempt": {"job_id": "j", "round": 0, "attempt": 1}},
        {"attempt": {"job_id": "j", "round": 1, "attempt": 1, "more": 1}},
        {"type": "Advert"},
    ],
)
def test_values_have_one_spelling(changes: dict[str, Any]) -> None:
    refused(Advert, spell({**ADVERT.model_dump(mode="json"), **changes}))


def test_numbers_have_one_spelling() -> None:
    spelling = ADVERT.encode()
    for other in (b"1.0", b"1e0", b"+1", b"01", b"-0", b'"1"'):
        refused(Advert, spelling.replace(b'"epoch":1', b'"epoch":' + other))


def test_sets_are_sorted_and_without_repetition() -> None:
    for statement, name in ((SURVIVORS, "sharers"), (SURVIVORS, "survivors"), (REVEAL, "shares")):
        value = statement.model_dump(mode="json")
        refused(type(statement), spell({**value, name: value[name][::-1]}))
        refused(type(statement), spell({**value, name: [*value[name], value[name][-1]]}))
    value = UPLOAD.model_dump(mode="json")
    refused(Upload, spell({**value, "complaints": ["b", "a"]}))
    refused(Upload, spell({**value, "complaints": ["a", "a"]}))


def test_one_reveal_cannot_show_both_secrets_of_a_hospital() -> None:
    value = REVEAL.model_dump(mode="json")
    both = [{"of": ID, "kind": kind, "share": "00" * 16} for kind in ("mask", "self")]
    refused(Reveal, spell({**value, "shares": both + value["shares"][1:]}))
    refused(Reveal, spell({**value, "shares": [{**value["shares"][0], "kind": "both"}]}))


def test_survivors_are_sharers_and_complain_about_others_only() -> None:
    value = SURVIVORS.model_dump(mode="json")
    refused(Survivors, spell({**value, "sharers": value["sharers"][1:]}))
    for complaints in ([ID], ["stranger"], ["hospital-03", "hospital-02"], ["hospital-02"] * 2):
        listed = [{**value["survivors"][0], "complaints": complaints}, *value["survivors"][1:]]
        refused(Survivors, spell({**value, "survivors": listed}))


def test_lists_and_statements_are_bounded() -> None:
    value = SURVIVORS.model_dump(mode="json")
    many = [f"h{i:04d}" for i in range(65)]
    refused(Survivors, spell({**value, "sharers": many}))
    refused(Upload, spell({**UPLOAD.model_dump(mode="json"), "segments": [HASH] * 2049}))
    parse(Upload, spell({**UPLOAD.model_dump(mode="json"), "segments": [HASH] * 2048}))
    refused(Survivors, b"[" * 100_000)
    refused(Survivors, b"[" * 60_000)


@pytest.mark.parametrize("content", ["AAA", "AAA=\n", "AA==AA==", "AB==", "A A=", "-_8=", "é"])
def test_base64_has_one_spelling(content: str) -> None:
    value = {
        "type": "epoch",
        "roster": HASH,
        "epoch": 1,
        "maker": ID,
        "parameter_set": "p",
        "key_sha256": HASH,
        "content": "AAA=",
        "boxes": [{"to": "a", "box": "00"}, {"to": "b", "box": "00"}],
    }
    parse(EpochStatement, spell(value))
    refused(EpochStatement, spell({**value, "content": content}))


def test_a_signature_holds_for_its_signer_and_statement_only() -> None:
    signed = sign(ADVERT, KEYS[0])
    assert open_signed(Advert, signed, ROSTER) == ADVERT
    flipped = bytes([signed.signature[0] ^ 1]) + signed.signature[1:]
    for forged in (
        signed._replace(signature=flipped),
        signed._replace(signature=b""),
        signed._replace(signature=signed.signature + b"\0"),
        signed._replace(hospital_id="hospital-02"),
        signed._replace(hospital_id="stranger"),
        signed._replace(hospital_id="x" * 10_000),
        signed._replace(statement=SURVIVORS.encode()),
    ):
        with pytest.raises(FedmeshError) as caught:
            open_signed(Advert, forged, ROSTER)
        assert caught.value.code is Code.STATEMENT_INVALID
        assert len(caught.value.message) < 200


def test_nobody_speaks_for_another() -> None:
    with pytest.raises(FedmeshError):
        sign(ADVERT, KEYS[1])
    statement = ADVERT.encode()
    forged = Signed("hospital-02", statement, KEYS[1].signing.sign(b"fedmesh secure-sum v1\n" + statement))
    verify(statement, "hospital-02", forged.signature, ROSTER)
    with pytest.raises(FedmeshError) as caught:
        open_signed(Advert, forged, ROSTER)
    assert caught.value.code is Code.STATEMENT_INVALID


def test_a_signature_without_the_domain_is_none() -> None:
    statement = ADVERT.encode()
    with pytest.raises(FedmeshError):
        open_signed(Advert, Signed(ID, statement, KEYS[0].signing.sign(statement)), ROSTER)


def test_signing_keys_alone_are_enough_to_check_a_signature() -> None:
    signed = sign(ADVERT, KEYS[0])
    signers = SigningKeys({ID: ROSTER.signing_key(ID)})
    assert open_signed(Advert, signed, signers) == ADVERT
    with pytest.raises(FedmeshError) as caught:
        open_signed(Advert, signed, SigningKeys({}))
    assert caught.value.code is Code.STATEMENT_INVALID


def test_digests_of_lists_do_not_depend_on_their_order() -> None:
    signed = [sign(ADVERT.model_copy(update={"hospital_id": key.hospital_id}), key) for key in KEYS]
    assert adverts_digest(signed) == adverts_digest(reversed(signed))
    assert adverts_digest(signed) != adverts_digest(signed[1:])
    assert sharers_digest(["b", "a"]) == sharers_digest(["a", "b"])
    # SHA-256 of ["a","b"].
    assert sharers_digest(["a", "b"]) == "0473ef2dc0d324ab659d3580c1134e9d812035905c4781fdd6d529b0c6860e13"


@pytest.mark.parametrize("segments", [1, 128, 1024])
def test_what_was_seen_before_is_judged_as_at_first(segments: int) -> None:
    """Small statements, large ones, and those too large to be remembered."""
    statement = UPLOAD.model_copy(update={"segments": tuple(f"{i:064x}" for i in range(segments))})
    signed = sign(statement, KEYS[0])
    forged = signed._replace(signature=bytes(64))
    for _ in range(2):
        assert open_signed(Upload, signed, ROSTER) == statement
        refused(Share, signed.statement)
        refused(Upload, signed.statement + b" ")
        for bad in (forged, signed._replace(hospital_id="hospital-02")):
            with pytest.raises(FedmeshError) as caught:
                open_signed(Upload, bad, ROSTER)
            assert caught.value.code is Code.STATEMENT_INVALID


@pytest.mark.parametrize("changes", [{}, {"job_id": "j"}, {"round": 2}, {"attempt": 2}, {"round": 2, "attempt": 2}])
def test_an_attempt_is_spelled_as_it_is(changes: dict[str, Any]) -> None:
    for _ in range(2):
        attempt = ATTEMPT.model_copy(update=changes)
        assert attempt.encode() == spell(attempt.model_dump())
