"""Notes, keys and checkpoints against the formats' published examples, and against forgery."""

import stat
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.transparency.checkpoint import (
    Checkpoint,
    generate_key,
    load_signing_key,
    open_checkpoint,
    open_note,
    parse_signing_key,
    parse_verifier_key,
    sign_checkpoint,
    sign_note,
)
from services.transparency.merkle import EMPTY_ROOT

# The example of golang.org/x/mod/sumdb/note, the format's first implementation. Ed25519 is deterministic.
SECRET = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
SIGNATURE = (
    "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
STRANGER = "\u2014 example.com/witness Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo=\n"

ORIGIN = "consortium.test/audit"


def refused(code: Code = Code.PROOF_INVALID) -> "pytest.RaisesExc[FedmeshError]":
    return pytest.raises(FedmeshError, check=lambda error: error.code is code)


def test_the_published_note_is_made_and_opened() -> None:
    key = parse_signing_key(SECRET)
    assert str(key.verifier) == PUBLIC
    assert sign_note(TEXT, key) == f"{TEXT}\n{SIGNATURE}"
    assert open_note(f"{TEXT}\n{SIGNATURE}", parse_verifier_key(PUBLIC)) == TEXT


def test_signatures_of_others_are_passed_over() -> None:
    verifier = parse_verifier_key(PUBLIC)
    assert open_note(f"{TEXT}\n{STRANGER}{SIGNATURE}", verifier) == TEXT
    with refused():
        open_note(f"{TEXT}\n{STRANGER}", verifier)


def test_every_flipped_character_of_a_note_is_refused() -> None:
    verifier = parse_verifier_key(PUBLIC)
    note = f"{TEXT}\n{SIGNATURE}"
    for spot in range(len(note)):
        changed = note[:spot] + chr(ord(note[spot]) ^ 1) + note[spot + 1 :]
        with refused():
            open_note(changed, verifier)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PeterNeumann",
        "PeterNeumann+c74f20a3",
        PUBLIC.replace("c74f20a3", "c74f20a4"),
        PUBLIC.replace("Peter", "peter"),
        PUBLIC + "A",
        PUBLIC.replace("ARpc", "AxpC"),
        "two words+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "\ud800+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ],
)
def test_malformed_keys_are_refused(text: str) -> None:
    with refused():
        parse_verifier_key(text)
    with refused(Code.CONFIG_INVALID):
        parse_signing_key("PRIVATE+KEY+" + text)


def test_a_made_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "log.key"
    public = generate_key(path, ORIGIN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_signing_key(path)
    assert str(key.verifier) == public
    assert parse_verifier_key(public) == key.verifier
    assert "private" not in repr(key)
    with refused(Code.CONFIG_INVALID):
        generate_key(path, ORIGIN)
    assert load_signing_key(path).verifier == key.verifier
    path.chmod(0o644)
    with refused(Code.CONFIG_INVALID):
        load_signing_key(path)
    with refused(Code.CONFIG_INVALID):
        generate_key(tmp_path / "other.key", "a name with spaces")


def test_checkpoints_have_the_published_layout_and_read_back(tmp_path: Path) -> None:
    generate_key(tmp_path / "log.key", ORIGIN)
    key = load_signing_key(tmp_path / "log.key")
    for size in (0, 1, 20852163, 2**63 - 1):
        checkpoint = Checkpoint(ORIGIN, size, EMPTY_ROOT)
        note = sign_checkpoint(checkpoint, key)
        assert note.startswith(f"{ORIGIN}\n{size}\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n\n\u2014 {ORIGIN} ")
        assert open_checkpoint(note, key.verifier) == checkpoint


@pytest.mark.parametrize(
    "text",
    [
        "{origin}\n1\n{root}\nextension\n",
        "{origin}\n01\n{root}\n",
        "{origin}\n-1\n{root}\n",
        "{origin}\n9223372036854775808\n{root}\n",
        "{origin}\n1\nAAAA\n",
        "{origin}\n1\nnot base64\n",
        "{origin}\n1\n",
        "\n1\n{root}\n",
        "other.test/audit\n1\n{root}\n",
    ],
)
def test_well_signed_nonsense_is_no_checkpoint(text: str, tmp_path: Path) -> None:
    generate_key(tmp_path / "log.key", ORIGIN)
    key = load_signing_key(tmp_path / "log.key")
    note = sign_note(text.format(origin=ORIGIN, root="47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="), key)
    with refused():
        open_checkpoint(note, key.verifier)


def test_a_key_signs_for_its_own_log_only() -> None:
    with refused(Code.INVALID_ARGUMENT):
        sign_checkpoint(Checkpoint(ORIGIN, 0, EMPTY_ROOT), parse_signing_key(SECRET))
    with refused(Code.INVALID_ARGUMENT):
        sign_note("no newline at the end", parse_signing_key(SECRET))
