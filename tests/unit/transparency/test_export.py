"""An export verifies from its files alone, and not after any change to any of them."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.transparency import export
from services.transparency.canonical import canonical_json
from services.transparency.checkpoint import (
    Checkpoint,
    SigningKey,
    VerifierKey,
    generate_key,
    load_signing_key,
    sign_checkpoint,
)
from services.transparency.cosignature import attach, cosign
from services.transparency.export import ExportWriter, write_export
from services.transparency.merkle import leaf_hash, tree_root
from services.transparency.verify import MAX_LINE_BYTES, verify_export

ORIGIN = "consortium.test/audit"
LEAVES = [
    canonical_json({"type": "round.committed", "body": {"round": number, "text": 'quoted "\u00e9"'}})
    for number in range(21)
]


def new_key(path: Path, name: str = ORIGIN) -> SigningKey:
    generate_key(path, name)
    return load_signing_key(path)


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return new_key(tmp_path / "log.key")


def note_over(leaves: list[bytes], key: SigningKey) -> str:
    root = tree_root(leaf_hash(leaf) for leaf in leaves)
    return sign_checkpoint(Checkpoint(key.name, len(leaves), root), key)


def write(folder: Path, key: SigningKey, leaves: list[bytes] = LEAVES) -> Path:
    write_export(folder, enumerate(leaves), note_over(leaves, key), key.verifier)
    return folder


@pytest.fixture
def exported(tmp_path: Path, key: SigningKey) -> Path:
    return write(tmp_path / "export", key)


def refusal(folder: Path, trusted: VerifierKey | str | None = None) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        verify_export(folder, trusted)
    assert caught.value.code is Code.PROOF_INVALID
    return caught.value


def rewrite_manifest(folder: Path) -> None:
    """What a forger would do who has no key: make the manifest agree again."""
    stated = json.loads((folder / export.MANIFEST).read_bytes())
    for name in export.CONTENT:
        raw = (folder / name).read_bytes()
        stated["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / export.MANIFEST).write_bytes(canonical_json(stated) + b"\n")


@pytest.mark.parametrize("count", [0, 1, 21])
def test_an_export_verifies_offline(tmp_path: Path, key: SigningKey, count: int) -> None:
    folder = write(tmp_path / "export", key, LEAVES[:count])
    report = verify_export(folder)
    assert (report.origin, report.size, report.key) == (ORIGIN, count, str(key.verifier))
    assert report.root == tree_root(leaf_hash(leaf) for leaf in LEAVES[:count]).hex()
    assert not report.trusted
    assert "agrees with itself" in report.statement


def test_a_trusted_key_makes_it_proof(exported: Path, key: SigningKey, tmp_path: Path) -> None:
    for trusted in (key.verifier, str(key.verifier), f"{key.verifier}\n"):
        report = verify_export(exported, trusted)
        assert report.trusted
        assert "agrees with itself" not in report.statement
    error = refusal(exported, new_key(tmp_path / "other.key").verifier)
    assert error.detail["file"] == export.KEY


def test_two_exports_of_one_checkpoint_are_equal(tmp_path: Path, key: SigningKey) -> None:
    first, second = write(tmp_path / "first", key), write(tmp_path / "second", key)
    for name in export.FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("name", export.FILES)
def test_every_flipped_byte_is_noticed(tmp_path: Path, key: SigningKey, name: str) -> None:
    """In the witnesses' lines of the checkpoint as well."""
    exported = tmp_path / "export"
    note = note_over(LEAVES, key)
    lines = [cosign(note, f"consortium.test/hospital/{who}", key.private, 1) for who in ("north", "south")]
    write_export(exported, enumerate(LEAVES), attach(note, lines), key.verifier)
    path = exported / name
    original = path.read_bytes()
    spots = range(len(original)) if len(original) < 800 else random.Random(7).sample(range(len(original)), 300)
    for spot in {*spots, 0, len(original) - 1}:
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(original)
            changed[spot] ^= mask
            path.write_bytes(bytes(changed))
            refusal(exported)
    path.write_bytes(original)
    verify_export(exported)


@pytest.mark.parametrize("name", export.FILES)
def test_a_byte_more_or_less_is_noticed(exported: Path, name: str) -> None:
    path = exported / name
    original = path.read_bytes()
    for changed in (b"", original[:-1], original[1:], original + b"\n", original + b" ", b"\n" + original):
        path.write_bytes(changed)
        refusal(exported)


def test_the_damaged_entry_is_named(exported: Path) -> None:
    path = exported / export.ENTRIES
    lines = path.read_bytes().splitlines(keepends=True)
    lines[13] = lines[13].replace(b'\\"round\\":13', b'\\"round\\":14')
    path.write_bytes(b"".join(lines))
    error = refusal(exported)
    assert error.detail == {"file": export.ENTRIES, "entry": "13"}
    assert "entry 13" in error.message


@pytest.mark.parametrize("how", ["replaced", "moved", "left out", "added"])
def test_a_forger_without_the_key_cannot_mend_the_export(exported: Path, how: str) -> None:
    leaves = list(LEAVES)
    if how == "replaced":
        leaves[5] = canonical_json({"type": "forged"})
    elif how == "moved":
        leaves[5], leaves[6] = leaves[6], leaves[5]
    elif how == "left out":
        del leaves[5]
    else:
        leaves.append(canonical_json({"type": "forged"}))
    lines = b"".join(export.entry_line(index, leaf) for index, leaf in enumerate(leaves))
    (exported / export.ENTRIES).write_bytes(lines)
    rewrite_manifest(exported)
    assert refusal(exported).detail["file"] == export.ENTRIES


def test_a_forger_with_a_key_of_his_own_is_caught_by_the_trusted_key(tmp_path: Path, key: SigningKey) -> None:
    forger = new_key(tmp_path / "forger.key")
    folder = write(tmp_path / "forged", forger, [canonical_json({"type": "forged"})])
    assert not verify_export(folder).trusted
    assert refusal(folder, key.verifier).detail["file"] == export.KEY


@pytest.mark.parametrize("name", export.FILES)
def test_missing_and_unlisted_files_are_named(exported: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / name).unlink()
    assert refusal(copy).detail["file"] == name
    (exported / "extra.txt").write_text("more")
    assert refusal(exported).detail["file"] == "extra.txt"


def test_what_is_no_export_is_refused(tmp_path: Path, exported: Path) -> None:
    refusal(tmp_path / "nowhere")
    (exported / export.ENTRIES).write_bytes(b"x" * (MAX_LINE_BYTES + 10))
    assert refusal(exported).detail == {"file": export.ENTRIES, "entry": "0"}


def test_a_leaf_that_is_not_canonical_is_refused(tmp_path: Path, key: SigningKey) -> None:
    folder = write(tmp_path / "export", key, [LEAVES[0], b'{"b":1, "a":2}'])
    assert refusal(folder).detail == {"file": export.ENTRIES, "entry": "1"}


def test_the_writer_refuses_gaps_foreign_checkpoints_and_used_folders(tmp_path: Path, key: SigningKey) -> None:
    note = note_over(LEAVES, key)
    with pytest.raises(FedmeshError) as caught, ExportWriter(tmp_path / "gap") as writer:
        writer.add(1, LEAVES[1])
    assert caught.value.code is Code.PROOF_INVALID
    with pytest.raises(FedmeshError) as caught:
        write_export(tmp_path / "short", enumerate(LEAVES[:-1]), note, key.verifier)
    assert caught.value.code is Code.PROOF_INVALID
    assert not (tmp_path / "short" / export.MANIFEST).exists()
    with pytest.raises(FedmeshError) as caught:
        write_export(tmp_path / "short", enumerate(LEAVES), note, key.verifier)
    assert caught.value.code is Code.ALREADY_EXISTS
