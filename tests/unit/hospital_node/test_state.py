"""The node's files: whole or absent, and bound to what was promised."""

import hashlib
import resource
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.files import write_durably
from services.hospital_node.store.state import SqliteNodeState, open_data_dir

JOB = "11111111-1111-4111-8111-111111111111"
ATTEMPT = AttemptId(JOB, 1, 1)


@pytest.fixture
def state(tmp_path: Path) -> SqliteNodeState:
    return SqliteNodeState(tmp_path)


def test_ciphertext_survives_a_restart_and_damage_is_noticed(state: SqliteNodeState, tmp_path: Path) -> None:
    assert state.ciphertext(ATTEMPT) is None
    state.save_ciphertext(ATTEMPT, b"bytes")
    again = SqliteNodeState(tmp_path)
    assert again.ciphertext(ATTEMPT) == b"bytes"
    assert again.record(ATTEMPT).ciphertext_sha256 == hashlib.sha256(b"bytes").hexdigest()
    next((tmp_path / "ciphertexts").iterdir()).write_bytes(b"other")
    assert again.ciphertext(ATTEMPT) is None


def test_one_sum_an_attempt(state: SqliteNodeState) -> None:
    state.pin_sum(ATTEMPT, "a" * 64)
    state.pin_sum(ATTEMPT, "a" * 64)
    with pytest.raises(FedmeshError) as caught:
        state.pin_sum(ATTEMPT, "b" * 64)
    assert caught.value.code is Code.WRONG_STATE


def test_finished_attempts_lose_their_ciphertexts_but_not_their_hashes(state: SqliteNodeState) -> None:
    attempts = [AttemptId(JOB, 1, 1), AttemptId(JOB, 1, 2), AttemptId(JOB, 2, 1)]
    for attempt in attempts:
        state.save_ciphertext(attempt, str(attempt).encode())
    state.finish_before(attempts[1], inclusive=False)
    assert [state.ciphertext(attempt) is None for attempt in attempts] == [True, False, False]
    state.finish_before(attempts[1], inclusive=True)
    assert [state.ciphertext(attempt) is None for attempt in attempts] == [True, True, False]
    assert state.record(attempts[0]).ciphertext_sha256
    state.finish_job(JOB)
    assert state.ciphertext(attempts[2]) is None


def test_states_are_kept_by_content_for_two_versions(state: SqliteNodeState, tmp_path: Path) -> None:
    for version in range(1, 5):
        sha256 = state.save_blob(JOB, f"state {version}".encode())
        state.adopt(JOB, version, sha256)
    kept = {state.blob(hashlib.sha256(f"state {version}".encode()).hexdigest()) for version in range(1, 5)}
    assert kept == {None, b"state 3", b"state 4"}
    newest = tmp_path / "states" / hashlib.sha256(b"state 4").hexdigest()
    newest.write_bytes(b"damaged")
    assert state.blob(newest.name) is None
    state.save_blob(JOB, b"state 4")
    assert state.blob(newest.name) == b"state 4"


def test_cursor(state: SqliteNodeState, tmp_path: Path) -> None:
    assert state.cursor() == ""
    state.save_cursor("5-0")
    assert SqliteNodeState(tmp_path).cursor() == "5-0"


def test_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FedmeshError) as caught:
            write_durably(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code is Code.STORE_FULL
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_data_folder_has_one_node(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    open_data_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FedmeshError) as caught:
        open_data_dir(folder)
    assert caught.value.code is Code.CONFIG_INVALID
