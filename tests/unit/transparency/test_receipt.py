"""A receipt holds from end to end, and not after any change to any part of it."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import MemberKeys, Roster, as_roster, found, sign_roster, succeed
from services.transparency.canonical import canonical_json
from services.transparency.checkpoint import Checkpoint, SigningKey, sign_checkpoint
from services.transparency.cosignature import attach, cosign, witness_name
from services.transparency.merkle import leaf_hash, tree_root
from services.transparency.receipt import (
    Counted,
    Place,
    Receipt,
    contribution_place,
    parse_receipt,
    verify_receipt,
)

CONSORTIUM = "consortium.test"
JOB = "0b54a3a5-3f6e-4b5c-9d7a-111111111111"
NAMES = ("east", "north", "south", "west")
LOG = SigningKey(f"{CONSORTIUM}/audit", Ed25519PrivateKey.from_private_bytes(bytes(32)))
MEMBERS = {name: MemberKeys.generate(name) for name in (*NAMES, "young")}
ROSTER = as_roster(found(CONSORTIUM, [MEMBERS[name].public() for name in NAMES]))
ROUND = [Counted(JOB, 3, 2, name, name.encode().hex().ljust(64, "0")) for name in NAMES]


def entry(listed: list[Counted] = ROUND, **changes: Any) -> bytes:
    """A round's entry as the registry and the log word it."""
    body = {
        "attempt": 2,
        "contributions": [
            {"ciphertext_sha256": item.ciphertext_sha256, "hospital_id": item.hospital_id} for item in listed
        ],
        "contributions_root": tree_root(leaf_hash(item.leaf()) for item in listed).hex(),
        "version": 3,
        **changes.pop("body", {}),
    }
    event = {
        "body": body,
        "source": f"spiffe://{CONSORTIUM}/service/registry",
        "subject": f"job/{JOB}",
        "type": "round.committed",
        **changes,
    }
    return canonical_json(event)


def cosigned(note: str, *names: str) -> str:
    lines = [cosign(note, witness_name(CONSORTIUM, name), MEMBERS[name].signing, 1000) for name in names]
    return attach(note, lines)


def receipt(leaf: bytes = b"", witnesses: tuple[str, ...] = NAMES[:3], listed: list[Counted] = ROUND) -> Receipt:
    """North's receipt in a log of seven entries."""
    leaf = leaf or entry(listed)
    leaves = [b"%d" % number for number in range(7)]
    leaves[4] = leaf
    note = sign_checkpoint(Checkpoint(LOG.name, 7, tree_root(map(leaf_hash, leaves))), LOG)
    proof = contribution_place(leaves, 4).hashes
    mine = listed.index(ROUND[1])
    place = contribution_place([item.leaf() for item in listed], mine)
    return Receipt(ROUND[1], place, leaf, Place(4, 7, proof), cosigned(note, *witnesses))


def refusal(wrong: Receipt, founding: Roster = ROSTER) -> str:
    with pytest.raises(FedmeshError) as caught:
        verify_receipt(parse_receipt(wrong.to_json()), LOG.verifier, founding)
    assert caught.value.code in (Code.PROOF_INVALID, Code.STATEMENT_INVALID)
    return caught.value.message


def test_a_receipt_says_what_was_counted() -> None:
    made = parse_receipt(receipt().to_json())
    verified = verify_receipt(made, LOG.verifier, ROSTER)
    assert made == receipt()
    assert (verified.index, verified.size, verified.counted) == (4, 7, ROUND[1])
    assert "counted exactly once in version 3" in verified.statement
    assert "cosigned by 3 of 4 hospitals, 3 are needed" in verified.statement


def test_every_flipped_byte_is_noticed() -> None:
    raw = receipt().to_json()
    for spot in {0, len(raw) - 1, *random.Random(7).sample(range(len(raw)), 500)}:
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(raw)
            changed[spot] ^= mask
            with pytest.raises(FedmeshError) as caught:
                verify_receipt(parse_receipt(bytes(changed)), LOG.verifier, ROSTER)
            assert caught.value.code in (Code.PROOF_INVALID, Code.STATEMENT_INVALID)
    for changed_raw in (b"", raw[:-1], raw + b"\n", b" " + raw, b"{}\n", raw + raw, b"\xff", b"[" * 5000):
        with pytest.raises(FedmeshError):
            parse_receipt(changed_raw)


def counted_twice() -> Receipt:
    return receipt(listed=[*ROUND, ROUND[1]])


def counted_twice_differently() -> Receipt:
    return receipt(listed=[*ROUND, replace(ROUND[1], ciphertext_sha256="f" * 64)])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (counted_twice, "does not count north exactly once"),
        (counted_twice_differently, "does not count north exactly once"),
        (lambda: receipt(entry(type="round.burnt")), "does not say that version 3"),
        (lambda: receipt(entry(source=f"spiffe://{CONSORTIUM}/service/coordinator")), "does not say that version 3"),
        (lambda: receipt(entry(subject="job/another")), "does not say that version 3"),
        (lambda: receipt(entry(body={"version": 4})), "does not say that version 3"),
        (lambda: receipt(entry(body={"attempt": 1})), "does not say that version 3"),
        (lambda: receipt(entry(body={"contributions_root": "0" * 64})), "root is not the one of the contributions"),
        (lambda: receipt(b'{"body":[]}'), "tells of no committed round"),
        (lambda: receipt(witnesses=NAMES[:2]), "2 of 4 hospitals cosigned it, 3 are needed"),
        (lambda: receipt(witnesses=(*NAMES[:3], "young")), "nobody of the roster signed"),
        (lambda: receipt(witnesses=(*NAMES[:3], "east")), "nobody of the roster signed"),
        (lambda: replace(receipt(), entry=replace(receipt().entry, size=8)), "the checkpoint has 7"),
        (lambda: replace(receipt(), entry=replace(receipt().entry, index=5)), "entry 5"),
        (lambda: replace(receipt(), contribution=Place(0, 1, ())), "in a tree of another size"),
        (lambda: replace(receipt(), counted=replace(ROUND[1], ciphertext_sha256="f" * 64)), "exactly once with this"),
    ],
)
def test_what_does_not_hold_is_named(make: Callable[[], Receipt], problem: str) -> None:
    assert problem in refusal(make())


def test_key_and_roster_come_from_elsewhere() -> None:
    stranger = SigningKey(LOG.name, Ed25519PrivateKey.generate())
    with pytest.raises(FedmeshError, match="not signed by"):
        verify_receipt(receipt(), stranger.verifier, ROSTER)
    others = as_roster(found(CONSORTIUM, [MemberKeys.generate(name).public() for name in NAMES]))
    assert "nobody of the roster signed" in refusal(receipt(), others)


def test_later_rosters_follow_from_the_founding_one() -> None:
    statement = succeed(ROSTER, [MEMBERS[name].public() for name in ("east", "north", "south", "young")])
    signatures = {name: sign_roster(statement, MEMBERS[name]) for name in NAMES[:3]}
    later = replace(receipt(witnesses=("east", "north", "young")), rosters=((statement, signatures),))
    assert verify_receipt(parse_receipt(later.to_json()), LOG.verifier, ROSTER).witnessed.roster.statement.version == 2
    assert "nobody of the roster signed" in refusal(replace(later, rosters=()))
    signatures.pop("south")
    assert "needs 3 signatures" in refusal(replace(later, rosters=((statement, signatures),)))
