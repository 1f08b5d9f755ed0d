"""What the node keeps of an attempt while it lasts: secrets, ciphertexts; and for good: hashes.

The unmasked ciphertext is durable before the hospital reports ready and is never sent. The masked one follows from it
and from the attempt's secrets, so it need not be durable before it is sent: whatever is lost is made again, the same.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.files import sync_file, write_durably, write_for_now
from services.hospital_node.store.sqlite import Database, sqlite_errors
from services.secure_sum.member_state import MemberState

_KEY: Final = "job_id = ? AND round = ? AND attempt = ?"
_UNMASKED: Final = "unmasked"
_MASKED: Final = "masked"


class AttemptStore:
    """Files in a folder of their own, states and hashes in the node's database."""

    def __init__(self, folder: Path, database: Database) -> None:
        self._folder = folder
        self._database = database
        folder.mkdir(mode=0o700, exist_ok=True)
        for partial in folder.glob(".*.partial"):
            partial.unlink()

    # ---- the protocol's state

    def state(self, attempt: AttemptId) -> MemberState | None:
        """The newest state that was saved.

        Raises: FedmeshError(DATA_INVALID) when it is damaged.
        """
        with self._database.connection() as connection:
            row = connection.execute(f"SELECT state FROM members WHERE {_KEY}", _key(attempt)).fetchone()  # noqa: S608
        return None if row is None else MemberState.from_json(row[0])

    def save_state(self, state: MemberState, *, unmasked_sha256: str = "", ciphertext_sha256: str = "") -> None:
        """Make a state durable, and the hash of what belongs to it. Raises: FedmeshError(STORE_FULL)."""
        named = state.attempt
        attempt = AttemptId(named.job_id, named.round, named.attempt)
        values = (*_key(attempt), state.roster, state.epoch, state.to_json())
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO members VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE SET state = ?6", values
            )
            for column, value in (("unmasked_sha256", unmasked_sha256), ("ciphertext_sha256", ciphertext_sha256)):
                if value:
                    _set(connection, attempt, column, value)
            if state.reveal is not None:
                _set(connection, attempt, "revealed", 1)

    def revealed_elsewhere(self, attempt: AttemptId) -> bool:
        """Whether this hospital revealed in another attempt of the round, remembered or forgotten."""
        with self._database.connection() as connection:
            found = connection.execute(
                "SELECT 1 FROM attempts WHERE revealed AND job_id = ? AND round = ? AND attempt <> ?", _key(attempt)
            )
            return found.fetchone() is not None

    def epochs_in_use(self) -> set[tuple[str, int]]:
        """(roster, epoch) of the attempts whose states are kept."""
        with self._database.connection() as connection:
            return {tuple(row) for row in connection.execute("SELECT DISTINCT roster_sha256, epoch FROM members")}

    def ciphertext_sha256(self, attempt: AttemptId) -> str:
        """SHA-256 of the attempt's masked ciphertext in hex; empty before there was one. It is remembered for good."""
        return self._hash(attempt, "ciphertext_sha256")

    # ---- the ciphertexts

    def save_unmasked(self, attempt: AttemptId, segments: Iterable[bytes]) -> str:
        """Keep what masking starts from, which never leaves; its SHA-256 in hex. Raises: FedmeshError(STORE_FULL)."""
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for segment in segments:
                digest.update(segment)
                yield segment

        write_durably(self._path(attempt, _UNMASKED), hashed())
        return digest.hexdigest()

    def has_unmasked(self, attempt: AttemptId) -> bool:
        """Whether what masking starts from is still there."""
        return self._path(attempt, _UNMASKED).is_file()

    def unmasked(self, attempt: AttemptId, sizes: Iterable[int]) -> Iterator[bytes]:
        """Read what masking starts from piece by piece.

        Raises: FedmeshError(WRONG_STATE), at its end at the latest, when it was lost or damaged.
        """
        return self._read(self._path(attempt, _UNMASKED), sizes, self._hash(attempt, "unmasked_sha256"))

    def write_masked(self, attempt: AttemptId, segments: Iterable[bytes]) -> None:
        """Write the masked ciphertext; durable only after `settle`. Raises: FedmeshError(STORE_FULL)."""
        write_for_now(self._path(attempt, _MASKED), segments)

    def masked(self, attempt: AttemptId, sizes: Iterable[int], sha256: str) -> Iterator[bytes]:
        """Read the masked ciphertext piece by piece.

        Raises: FedmeshError(WRONG_STATE), at its end at the latest, when it is not the one of this SHA-256.
        """
        return self._read(self._path(attempt, _MASKED), sizes, sha256)

    def settle(self, attempt: AttemptId) -> None:
        """Make the masked ciphertext durable and delete what it was made from."""
        unmasked = self._path(attempt, _UNMASKED)
        if unmasked.is_file():
            sync_file(self._path(attempt, _MASKED))
            unmasked.unlink()

    # ---- the end

    def finish_before(self, attempt: AttemptId, *, inclusive: bool) -> None:
        """Delete secrets and ciphertexts of a job's attempts before (or up to) this one; hashes stay."""
        with self._database.transaction() as connection:
            connection.execute(
                f"DELETE FROM members WHERE job_id = ?1 AND (round, attempt) {'<=' if inclusive else '<'} (?2, ?3)",  # noqa: S608 - a constant
                _key(attempt),
            )
        for path in self._folder.glob(f"{attempt.job_id}.*"):
            numbers = path.name.split(".")
            other = AttemptId(attempt.job_id, int(numbers[1]), int(numbers[2]))
            if other < attempt or (inclusive and other == attempt):
                path.unlink(missing_ok=True)

    def finish_job(self, job_id: str) -> None:
        """Delete all secrets and ciphertexts of a job; hashes stay."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM members WHERE job_id = ?", (job_id,))
        for path in self._folder.glob(f"{job_id}.*"):
            path.unlink(missing_ok=True)

    def _read(self, path: Path, sizes: Iterable[int], sha256: str) -> Iterator[bytes]:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                for size in sizes:
                    piece = file.read(size)
                    digest.update(piece)
                    if len(piece) != size:
                        break
                    yield piece
        except OSError:
            sha256 = "lost"
        if digest.hexdigest() != sha256:
            raise FedmeshError(Code.WRONG_STATE, "the ciphertext of this attempt is lost: nothing else is sent for it")

    def _hash(self, attempt: AttemptId, column: str) -> str:
        with self._database.connection() as connection:
            row = connection.execute(
                f"SELECT {column} FROM attempts WHERE {_KEY}",  # noqa: S608 - our columns
                _key(attempt),
            ).fetchone()
        return "" if row is None else str(row[0])

    def _path(self, attempt: AttemptId, kind: str) -> Path:
        return self._folder / f"{attempt.job_id}.{attempt.round}.{attempt.attempt}.{kind}"


def read_ciphertext_sha256(state_file: Path, attempt: AttemptId) -> str:
    """What a node sent in an attempt, SHA-256 in hex, or nothing; also while the node runs, and changes nothing.

    Raises: FedmeshError(NOT_FOUND) when there is no such file; STORE_UNAVAILABLE; CONFIG_INVALID when it is damaged.
    """
    if not state_file.is_file():
        raise FedmeshError(Code.NOT_FOUND, f"no hospital node ever ran on {state_file.parent}")
    with sqlite_errors(state_file):
        connection = sqlite3.connect(f"{state_file.resolve().as_uri()}?mode=ro", uri=True, timeout=10.0)
        try:
            row = connection.execute(f"SELECT ciphertext_sha256 FROM attempts WHERE {_KEY}", _key(attempt)).fetchone()  # noqa: S608
        finally:
            connection.close()
    return "" if row is None else str(row[0])


def _key(attempt: AttemptId) -> tuple[str, int, int]:
    return attempt.job_id, attempt.round, attempt.attempt


def _set(connection: sqlite3.Connection, attempt: AttemptId, column: str, value: str | int) -> None:
    connection.execute(
        f"INSERT INTO attempts (job_id, round, attempt, {column}) VALUES (?1, ?2, ?3, ?4)"  # noqa: S608 - our column
        f" ON CONFLICT DO UPDATE SET {column} = ?4",
        (*_key(attempt), value),
    )
