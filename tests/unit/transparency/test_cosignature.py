"""Cosignatures against the format's published example, and against forgery; quorums of a roster."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import MemberKeys, Roster, as_roster, found, sign_roster, succeed
from services.transparency.checkpoint import Checkpoint, SigningKey, open_checkpoint, sign_checkpoint, split_note
from services.transparency.cosignature import (
    WitnessKey,
    attach,
    cosign,
    log_signed,
    verify_line,
    witness_name,
    witnesses,
)
from services.transparency.witness import best_witnessed, follow, witness_keys, witnessed

# The example of C2SP tlog-cosignature.
EXAMPLE = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "\u2014 example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "\u2014 witness.example.com/w1 "
    "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
ORIGIN = "consortium.test/audit"
NAMES = ("east", "north", "south", "west")
LOG = SigningKey(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(32)))
NOTE = sign_checkpoint(Checkpoint(ORIGIN, 7, hashlib.sha256(b"root").digest()), LOG)


@pytest.fixture(scope="module")
def members() -> dict[str, MemberKeys]:
    return {name: MemberKeys.generate(name) for name in NAMES}


@pytest.fixture(scope="module")
def roster(members: dict[str, MemberKeys]) -> Roster:
    return as_roster(found("consortium.test", [keys.public() for keys in members.values()]))


def line_of(keys: MemberKeys, note: str = NOTE, at: int = 1000) -> str:
    return cosign(note, witness_name("consortium.test", keys.hospital_id), keys.signing, at)


def refused() -> "pytest.RaisesExc[FedmeshError]":
    return pytest.raises(FedmeshError, check=lambda error: error.code is Code.PROOF_INVALID)


def test_the_published_example_has_our_form() -> None:
    text, ((_, signed), (name, raw)) = split_note(EXAMPLE)
    assert (name, len(signed), len(raw)) == ("witness.example.com/w1", 4 + 64, 4 + 8 + 64)
    assert int.from_bytes(raw[4:12], "big") == 1679315147
    assert log_signed(EXAMPLE, "example.com/behind-the-sofa") + EXAMPLE.splitlines(keepends=True)[-1] == EXAMPLE
    assert text == "".join(EXAMPLE.splitlines(keepends=True)[:3])


def test_a_line_is_what_the_format_says() -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = private.public_key().public_bytes_raw()
    line = cosign(NOTE, "w", private, 1679315147)
    raw = base64.b64decode(line.removeprefix("\u2014 w ").removesuffix("\n"))
    assert raw[:4] == hashlib.sha256(b"w\n\x04" + public).digest()[:4]
    message = b"cosignature/v1\ntime 1679315147\n" + split_note(NOTE)[0].encode()
    private.public_key().verify(raw[12:], message)
    assert verify_line(NOTE, line, WitnessKey("w", public)) == 1679315147


def test_a_cosigned_note_is_still_the_logs(members: dict[str, MemberKeys]) -> None:
    note = attach(NOTE, [line_of(keys) for keys in members.values()])
    assert open_checkpoint(note, LOG.verifier).size == 7
    assert log_signed(note, ORIGIN) == NOTE


def test_every_flipped_character_of_a_line_is_refused(members: dict[str, MemberKeys]) -> None:
    keys = members["north"]
    line = line_of(keys)
    key = WitnessKey("consortium.test/hospital/north", keys.signing.public_key().public_bytes_raw())
    verify_line(NOTE, line, key)
    for spot in range(len(line)):
        with refused():
            verify_line(NOTE, line[:spot] + chr(ord(line[spot]) ^ 1) + line[spot + 1 :], key)
    other = sign_checkpoint(Checkpoint(ORIGIN, 8, hashlib.sha256(b"root").digest()), LOG)
    with refused():
        verify_line(other, line, key)


def test_a_log_signature_is_no_cosignature_and_the_other_way_round(members: dict[str, MemberKeys]) -> None:
    """One key, two types of signature: the key id and the signed text keep them apart."""
    name = "consortium.test/hospital/north"
    key = WitnessKey(name, members["north"].signing.public_key().public_bytes_raw())
    as_log = sign_checkpoint(Checkpoint(name, 7, bytes(32)), SigningKey(name, members["north"].signing))
    assert witnesses(as_log, [key]) == {}
    with refused():
        open_checkpoint(attach(NOTE, [line_of(members["north"])]), SigningKey(name, members["north"].signing).verifier)


def test_a_quorum_is_more_than_two_thirds_of_the_roster(members: dict[str, MemberKeys], roster: Roster) -> None:
    lines = [line_of(members[name], at=1000 + number) for number, name in enumerate(NAMES)]
    counts = [witnessed(attach(NOTE, lines[:number]), roster) for number in range(5)]
    assert [item.complete for item in counts] == [False, False, False, True, True]
    assert [item.since for item in counts] == [0, 0, 0, 1002, 1002]
    twice = attach(NOTE, [lines[0], line_of(members["east"], at=2000), lines[1]])
    assert witnessed(twice, roster).signers == {"east": 2000, "north": 1001}, "a hospital counts once"


def test_keys_that_the_roster_does_not_have_count_for_nothing(roster: Roster) -> None:
    strangers = [line_of(MemberKeys.generate(name)) for name in (*NAMES, "far")]
    assert witnessed(attach(NOTE, strangers), roster).signers == {}


def test_a_wrong_line_under_a_known_key_is_refused(members: dict[str, MemberKeys], roster: Roster) -> None:
    elsewhere = sign_checkpoint(Checkpoint(ORIGIN, 8, bytes(32)), LOG)
    with refused():
        witnessed(attach(NOTE, [line_of(members["north"], elsewhere)]), roster)


def test_the_newest_roster_with_a_quorum_counts(members: dict[str, MemberKeys], roster: Roster) -> None:
    joined = MemberKeys.generate("young")
    statement = succeed(roster, [*(keys.public() for keys in members.values()), joined.public()])
    signatures = {name: sign_roster(statement, members[name]) for name in NAMES[:3]}
    chain = follow(roster, [(statement, signatures)])
    three = attach(NOTE, [line_of(members[name]) for name in NAMES[:3]])
    assert best_witnessed(three, chain).roster is chain[0], "three of four, not of five"
    assert best_witnessed(attach(three, [line_of(joined)]), chain).roster is chain[1]
    assert not best_witnessed(NOTE, chain).complete
    assert witness_keys(chain[1])["young"].name == "consortium.test/hospital/young"
    with pytest.raises(FedmeshError):
        follow(roster, [(statement, {"north": signatures["north"]})])
