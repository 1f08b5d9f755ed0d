"""Receipts: a hospital's proof that its ciphertext was counted, exactly once, in one version of a model.

A receipt is one file of canonical JSON that needs no server to be checked, only the log's public key and the founding
roster. It chains: the contribution is in the Merkle root of its round; the round's entry lists every contribution,
gives that root, and names the hospital once; the entry is in the log; the log's checkpoint is signed by the log and
cosigned by a quorum of the roster.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import Roster
from services.transparency.canonical import canonical_json, parse_canonical
from services.transparency.checkpoint import VerifierKey, open_checkpoint, signature_line, split_note
from services.transparency.merkle import HASH_BYTES, Frontier, inclusion_proof, leaf_hash, tree_root, verify_inclusion
from services.transparency.witness import Witnessed, best_witnessed, follow, witness_keys

FORMAT: Final = "fedmesh-receipt/1"
MAX_BYTES: Final = 1 << 20
_KEYS: Final = {
    "attempt",
    "checkpoint",
    "ciphertext_sha256",
    "contribution",
    "entry",
    "format",
    "hospital_id",
    "job_id",
    "rosters",
    "version",
}


@dataclass(frozen=True)
class Counted:
    """What was counted: one hospital's ciphertext (SHA-256 in hex) in one version of a job, made by one attempt."""

    job_id: str
    version: int
    attempt: int
    hospital_id: str
    ciphertext_sha256: str

    def leaf(self) -> bytes:
        """The leaf of the round's contribution tree: canonical JSON of all of it."""
        return canonical_json(
            {
                "attempt": self.attempt,
                "ciphertext_sha256": self.ciphertext_sha256,
                "hospital_id": self.hospital_id,
                "job_id": self.job_id,
                "version": self.version,
            }
        )


@dataclass(frozen=True)
class Place:
    """A leaf's place in a tree, and the inclusion proof, 32 bytes each, leaf to root."""

    index: int
    size: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class Receipt:
    """What is in the file. rosters: what followed the founding roster, statement and signatures, oldest first."""

    counted: Counted
    contribution: Place
    leaf: bytes
    entry: Place
    checkpoint: str
    rosters: tuple[tuple[bytes, Mapping[str, bytes]], ...] = ()

    def to_json(self) -> bytes:
        """The file's bytes: one receipt has one spelling."""
        value: dict[str, Any] = {
            "attempt": self.counted.attempt,
            "checkpoint": self.checkpoint,
            "ciphertext_sha256": self.counted.ciphertext_sha256,
            "contribution": _place(self.contribution),
            "entry": {**_place(self.entry), "leaf": self.leaf.decode("utf-8")},
            "format": FORMAT,
            "hospital_id": self.counted.hospital_id,
            "job_id": self.counted.job_id,
            "rosters": [
                {
                    "signatures": {name: one.hex() for name, one in signed.items()},
                    "statement": statement.decode("utf-8"),
                }
                for statement, signed in self.rosters
            ],
            "version": self.counted.version,
        }
        return canonical_json(value) + b"\n"


@dataclass(frozen=True)
class Verified:
    """What a receipt proves."""

    counted: Counted
    index: int
    size: int
    witnessed: Witnessed

    @property
    def statement(self) -> str:
        """The result in words."""
        told, seen = self.counted, self.witnessed
        cosigned = f"{len(seen.signers)} of {seen.roster.size} hospitals, {seen.roster.threshold} are needed"
        return (
            f"{told.hospital_id}'s ciphertext {told.ciphertext_sha256} was counted exactly once in version"
            f" {told.version} of job {told.job_id}: entry {self.index} of a log of {self.size} entries, signed by the"
            f" log and cosigned by {cosigned}."
        )


def parse_receipt(raw: bytes) -> Receipt:
    """Read a receipt; nothing of it is verified.

    Raises: FedmeshError(PROOF_INVALID) when it is not one, or in another spelling.
    """
    try:
        value = parse_canonical(raw.removesuffix(b"\n")) if len(raw) <= MAX_BYTES else {}
        if value.keys() != _KEYS or value["format"] != FORMAT:
            _refuse(f"the file is no receipt of format {FORMAT}")
        counted = Counted(
            *(value[name] for name in ("job_id", "version", "attempt", "hospital_id", "ciphertext_sha256"))
        )
        rosters = tuple(
            (item["statement"].encode(), {name: bytes.fromhex(one) for name, one in item["signatures"].items()})
            for item in value["rosters"]
        )
        entry, contribution = _read_place(value["entry"]), _read_place(value["contribution"])
        leaf = value["entry"]["leaf"].encode()
        receipt = Receipt(counted, contribution, leaf, entry, str(value["checkpoint"]), rosters)
        if receipt.to_json() != raw:
            _refuse("the receipt is in another spelling than its own")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmeshError(Code.PROOF_INVALID, "the file is damaged, or no receipt") from error
    return receipt


def verify_receipt(
    receipt: Receipt, verifier: VerifierKey, founding: Roster, *, require_quorum: bool = True
) -> Verified:
    """Check a receipt from end to end.

    verifier, founding: the log's public key and the founding roster, from a source other than the receipt.

    Raises: FedmeshError(PROOF_INVALID | STATEMENT_INVALID) saying which link does not hold.
    """
    told = receipt.counted
    root = _check_entry(receipt, verifier.name.removesuffix("/audit"))
    place = receipt.contribution
    verify_inclusion(leaf_hash(told.leaf()), place.index, place.size, place.hashes, root)
    checkpoint = open_checkpoint(receipt.checkpoint, verifier)
    if receipt.entry.size != checkpoint.size:
        _refuse(f"the entry is proven in a tree of {receipt.entry.size} entries, the checkpoint has {checkpoint.size}")
    hashes = receipt.entry.hashes
    verify_inclusion(leaf_hash(receipt.leaf), receipt.entry.index, checkpoint.size, hashes, checkpoint.root)
    rosters = follow(founding, ((statement, dict(signed)) for statement, signed in receipt.rosters))
    witnessed = best_witnessed(receipt.checkpoint, rosters)
    if counted_lines(receipt.checkpoint, verifier, witnessed) != receipt.checkpoint:
        _refuse("the checkpoint has lines that nobody of the roster signed")
    if require_quorum and not witnessed.complete:
        roster = witnessed.roster
        _refuse(
            f"the checkpoint is not witnessed: {len(witnessed.signers)} of {roster.size} hospitals cosigned it, "
            f"{roster.threshold} are needed"
        )
    return Verified(told, receipt.entry.index, checkpoint.size, witnessed)


def counted_lines(note: str, verifier: VerifierKey, witnessed: Witnessed) -> str:
    """The note with the lines of the log and of the witnesses that were counted, once each, and no others."""
    text, signatures = split_note(note)
    keys = witness_keys(witnessed.roster)
    known = {(keys[name].name, keys[name].key_id) for name in witnessed.signers} | {(verifier.name, verifier.key_id)}
    lines: dict[tuple[str, bytes], str] = {}
    for name, raw in signatures:
        if (name, raw[:4]) in known:
            lines.setdefault((name, raw[:4]), signature_line(name, raw))
    return f"{text}\n" + "".join(lines.values())


def contribution_place(leaves: Sequence[bytes], index: int) -> Place:
    """Where a leaf stands among a round's leaves, with its proof (RFC 9162, 2.1.3)."""
    frontier = Frontier()
    made = {(node.level, node.position): node.hash for leaf in leaves for node in frontier.append(leaf_hash(leaf))}
    proof = inclusion_proof(index, len(leaves), lambda level, position: made[level, position])
    return Place(index, len(leaves), tuple(proof))


def _check_entry(receipt: Receipt, consortium: str) -> bytes:
    """The round's root (32 bytes), once the entry is found to be the registry's word on this round, and to list the
    hospital once, with this ciphertext."""
    told = receipt.counted
    try:
        event = parse_canonical(receipt.leaf)
        body: dict[str, Any] = event["body"]
        listed = [
            Counted(told.job_id, body["version"], body["attempt"], item["hospital_id"], item["ciphertext_sha256"])
            for item in body["contributions"]
        ]
        said = (event["type"], event["source"], event["subject"], body["version"], body["attempt"])
        root = bytes.fromhex(body["contributions_root"])
    except (ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.PROOF_INVALID, "the entry tells of no committed round") from error
    registry = f"spiffe://{consortium}/service/registry"
    if said != ("round.committed", registry, f"job/{told.job_id}", told.version, told.attempt):
        _refuse(f"the entry does not say that version {told.version} of job {told.job_id} was committed")
    if listed.count(told) != 1 or [item.hospital_id for item in listed].count(told.hospital_id) != 1:
        _refuse(f"the entry does not count {told.hospital_id} exactly once with this ciphertext")
    if tree_root(leaf_hash(item.leaf()) for item in listed) != root:
        _refuse("the entry's root is not the one of the contributions that it lists")
    if receipt.contribution.size != len(listed):
        _refuse("the contribution is proven in a tree of another size than the entry's list")
    return root


def _place(place: Place) -> dict[str, Any]:
    return {"hashes": [one.hex() for one in place.hashes], "index": place.index, "size": place.size}


def _read_place(value: dict[str, Any]) -> Place:
    hashes = _hashes(value["hashes"])
    numbers = value["index"], value["size"]
    if not all(type(number) is int for number in numbers):
        raise TypeError("a place is two integers")
    return Place(*numbers, hashes)


def _hashes(values: Iterable[str]) -> tuple[bytes, ...]:
    hashes = tuple(bytes.fromhex(one) for one in values)
    if any(len(one) != HASH_BYTES for one in hashes):
        raise ValueError("a hash has another length")
    return hashes


def _refuse(message: str) -> NoReturn:
    raise FedmeshError(Code.PROOF_INVALID, message)
