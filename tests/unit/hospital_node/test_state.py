"""The node's files: whole or absent, and bound to what was promised."""

import hashlib
import resource
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import RosterFacts
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.domain.witness_ports import Refusal, RefusalKind
from services.hospital_node.store.files import destroy_file, write_durably
from services.hospital_node.store.state import _SINCE_1, SqliteNodeState, open_data_dir
from services.hospital_node.store.witness import MOST_REFUSALS, STATE_FILE, read_witness
from services.secure_sum.member import Member, MemberState
from tests.support.secure_sum import JOB, Consortium, names

ATTEMPT = AttemptId(JOB, 1, 1)
SIZES = (4, 3)


@pytest.fixture
def state(tmp_path: Path) -> SqliteNodeState:
    return SqliteNodeState(tmp_path)


def begun(attempt: AttemptId = ATTEMPT) -> MemberState:
    consortium = Consortium.of(4)
    keys = consortium.keys[names(4)[0]]
    return Member(keys, consortium.roster).begin(attempt.ref, 1, names(4))


def test_secrets_survive_a_restart(state: SqliteNodeState, tmp_path: Path) -> None:
    assert state.attempts.state(ATTEMPT) is None
    kept = begun()
    state.attempts.save_state(kept)
    assert SqliteNodeState(tmp_path).attempts.state(ATTEMPT) == kept
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob(f"{STATE_FILE}*")} == {0}


def test_every_transaction_waits_for_the_disk(state: SqliteNodeState) -> None:
    """Also on a connection whose last user did without: what was revealed must not be forgotten in a power failure."""
    full = 2
    for _ in range(3):
        state.save_cursor("1-0")
        with state._database.transaction() as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (full,)


def test_a_lost_or_damaged_ciphertext_is_noticed(state: SqliteNodeState, tmp_path: Path) -> None:
    attempts = state.attempts
    sha256 = attempts.save_unmasked(ATTEMPT, iter([b"abcd", b"efg"]))
    assert sha256 == hashlib.sha256(b"abcdefg").hexdigest()
    attempts.save_state(begun(), unmasked_sha256=sha256)
    assert list(attempts.unmasked(ATTEMPT, SIZES)) == [b"abcd", b"efg"]
    (path,) = (tmp_path / "ciphertexts").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    for content in (b"abcdefX", b"abcde", b""):
        path.write_bytes(content)
        with pytest.raises(FedmeshError) as caught:
            list(attempts.unmasked(ATTEMPT, SIZES))
        assert caught.value.code is Code.WRONG_STATE
    path.unlink()
    with pytest.raises(FedmeshError):
        list(attempts.unmasked(ATTEMPT, SIZES))


def test_the_unmasked_ciphertext_goes_when_the_masked_one_is_durable(state: SqliteNodeState, tmp_path: Path) -> None:
    attempts = state.attempts
    attempts.save_unmasked(ATTEMPT, iter([b"abcd"]))
    attempts.write_masked(ATTEMPT, iter([b"wxyz"]))
    assert len(list((tmp_path / "ciphertexts").iterdir())) == 2
    attempts.settle(ATTEMPT)
    attempts.settle(ATTEMPT)
    assert [path.suffix for path in (tmp_path / "ciphertexts").iterdir()] == [".masked"]
    assert list(attempts.masked(ATTEMPT, (4,), hashlib.sha256(b"wxyz").hexdigest())) == [b"wxyz"]


def test_finished_attempts_lose_secrets_and_ciphertexts_but_not_their_hashes(
    state: SqliteNodeState, tmp_path: Path
) -> None:
    attempts = [AttemptId(JOB, 1, 1), AttemptId(JOB, 1, 2), AttemptId(JOB, 2, 1)]
    for attempt in attempts:
        state.attempts.save_unmasked(attempt, [b"x"])
        state.attempts.save_state(begun(attempt), ciphertext_sha256="ab" * 32)
    secret = state.attempts.state(attempts[0]).self_seed.hex().encode()  # type: ignore[union-attr]
    state.attempts.finish_before(attempts[1], inclusive=False)
    assert [state.attempts.state(attempt) is None for attempt in attempts] == [True, False, False]
    state.attempts.finish_before(attempts[1], inclusive=True)
    assert [state.attempts.has_unmasked(attempt) for attempt in attempts] == [False, False, True]
    assert state.attempts.ciphertext_sha256(attempts[0]) == "ab" * 32
    state.attempts.finish_job(JOB)
    assert state.attempts.epochs_in_use() == set()
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert secret not in (tmp_path / STATE_FILE).read_bytes(), "deleted secrets are overwritten"


def test_states_are_kept_by_content_for_two_versions(state: SqliteNodeState, tmp_path: Path) -> None:
    for version in range(1, 5):
        sha256 = state.save_blob(JOB, f"state {version}".encode())
        assert state.adopt(JOB, version, sha256) == version
    kept = {state.blob(hashlib.sha256(f"state {version}".encode()).hexdigest()) for version in range(1, 5)}
    assert kept == {None, b"state 3", b"state 4"}
    assert state.adopt(JOB, 2, hashlib.sha256(b"state 2").hexdigest()) == 4, "it does not go back"
    newest = tmp_path / "states" / hashlib.sha256(b"state 4").hexdigest()
    newest.write_bytes(b"damaged")
    assert state.blob(newest.name) is None
    state.save_blob(JOB, b"state 4")
    assert state.blob(newest.name) == b"state 4"


def test_cursor(state: SqliteNodeState, tmp_path: Path) -> None:
    assert state.cursor() == ""
    state.save_cursor("5-0")
    assert SqliteNodeState(tmp_path).cursor() == "5-0"


def test_a_roster_of_a_version_is_never_replaced(state: SqliteNodeState, tmp_path: Path) -> None:
    facts = RosterFacts(b"second", {"a": b"\1", "b": b"\2"})
    state.save_roster(2, facts)
    with pytest.raises(sqlite3.IntegrityError):
        state.save_roster(2, RosterFacts(b"another", {}))
    assert SqliteNodeState(tmp_path).rosters() == [facts]


def test_a_state_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        connection.executescript(_SINCE_1 + "; PRAGMA user_version = 1")
        connection.execute("INSERT INTO cursor VALUES (1, '7-0')")
        connection.execute("INSERT INTO attempts VALUES (?, 1, 1, 'hash', 'sum')", (JOB,))
    state = SqliteNodeState(tmp_path)
    assert (state.cursor(), state.attempts.ciphertext_sha256(ATTEMPT)) == ("7-0", "hash")
    state.attempts.save_state(begun())
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    assert SqliteNodeState(tmp_path).attempts.epochs_in_use()


def test_a_state_of_a_newer_build_is_refused(tmp_path: Path) -> None:
    SqliteNodeState(tmp_path)
    with sqlite3.connect(tmp_path / STATE_FILE) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(FedmeshError, match="version 9"):
        SqliteNodeState(tmp_path)


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


def test_a_destroyed_file_was_overwritten(tmp_path: Path) -> None:
    path, link = tmp_path / "secret", tmp_path / "link"
    path.write_bytes(b"secret")
    link.hardlink_to(path)
    destroy_file(path)
    destroy_file(path)
    assert not path.exists()
    assert link.read_bytes() == bytes(6)


def test_a_data_folder_has_one_node(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    open_data_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FedmeshError) as caught:
        open_data_dir(folder)
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_log_that_goes_wrong_again_and_again_does_not_fill_the_disk(state: SqliteNodeState, tmp_path: Path) -> None:
    def refusal(number: int, seen: str = "seen", log: str = "one") -> Refusal:
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
        return Refusal(log, RefusalKind.FORK, f"held {number}", seen, "a fork", at)

    memory = state.witness
    first = [refusal(number) for number in range(MOST_REFUSALS)]
    assert [memory.keep_evidence(one) for one in first] == [(one, True) for one in first]
    assert memory.keep_evidence(refusal(0, "another")) == (first[0], False), "the first one of its kind stands"
    beyond = refusal(MOST_REFUSALS)
    assert memory.keep_evidence(beyond) == (beyond, False), "an alarm can still be raised with it"
    other = refusal(0, log="two")
    assert memory.keep_evidence(other) == (other, True), "each log has its own room"
    assert sorted(read_witness(tmp_path)[1], key=lambda one: (one.log, one.at)) == [*first, other]
