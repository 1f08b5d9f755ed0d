"""The centre after a run without privacy: neither a model, nor a sum, nor an update is anywhere in what it holds."""

import itertools
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from services.demo.run import DemoOptions, choose_plan
from services.embedded.guard import Guard
from services.embedded.stack import Stack
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.training.state import read_state
from services.hospital_node.training.trainer import Trainer
from services.hospital_node.usecases.states import open_newest
from services.secure_sum.roster import MemberKeys, load_roster_file
from services.secure_sum.sealed import OVERHEAD_BYTES
from tests.support.command import FEDMESH

HOSPITALS = 4
WORD = 8
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Run:
    """A finished demonstration, and everything that its centre holds: name -> bytes."""

    folder: Path
    held: dict[str, bytes]
    sealed: bytes
    job_id: str

    @property
    def stack(self) -> Stack:
        return Stack(self.folder / "stack")

    def found(self, needles: Iterable[bytes]) -> list[str]:
        """Where any of some byte strings stands, each of 8 bytes at least."""
        wanted = tuple(set(needles))
        assert wanted
        assert min(map(len, wanted)) >= WORD
        beginnings = np.unique(np.frombuffer(b"".join(needle[:WORD] for needle in wanted), dtype="<u8"))
        return sorted(name for name, content in self.held.items() if _stands_in(content, beginnings, wanted))


def _stands_in(content: bytes, beginnings: NDArray[np.uint64], wanted: tuple[bytes, ...]) -> bool:
    """Whether a needle stands in the content. There are thousands, and one look at all words finds their beginnings."""
    likely = np.zeros(1 << 16, dtype=bool)
    likely[beginnings & 0xFFFF] = True
    padded = content + bytes(WORD)
    for offset in range(WORD):
        words = np.frombuffer(padded, dtype="<u8", offset=offset, count=(len(padded) - offset) // WORD)
        places = np.flatnonzero(likely[words & 0xFFFF])
        for place in places[np.isin(words[places], beginnings)]:
            if content.startswith(wanted, offset + WORD * int(place)):
                return True
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round, so that the final state follows from one sum."""
    folder = tmp_path_factory.mktemp("blind")
    command = [*FEDMESH, "demo", "--dir", str(folder), "--hospitals", str(HOSPITALS), "--rounds", "1"]
    done = subprocess.run([*command, "--privacy", "none"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stack = folder / "stack"
    held = {}
    for part in ("postgres", "redis", "run", "traces"):
        for path in (stack / part).rglob("*"):
            # A hospital's own log and spans are not the centre's, but nothing may be in them either.
            if path.is_file():
                held[str(path.relative_to(stack))] = path.read_bytes()
    tables, sealed, job_id = _tables(folder)
    return Run(folder, {**held, **tables}, sealed, job_id)


def _tables(folder: Path) -> tuple[dict[str, bytes], bytes, str]:
    """All rows as PostgreSQL gives them out, which undoes any compression on the disk; and the one sealed state."""
    guard = Guard()
    stack = Stack(folder / "stack", guard=guard)
    stack.postgres.start()
    try:
        tables = {}
        with psycopg.connect(stack.postgres.dsn()) as connection:
            names = connection.execute(
                "select schemaname, tablename from pg_tables where schemaname in ('registry', 'audit')"
            ).fetchall()
            for schema, table in names:
                query = f'copy (select * from "{schema}"."{table}") to stdout (format binary)'
                with connection.cursor().copy(query) as copy:
                    tables[f"table {schema}.{table}"] = b"".join(map(bytes, copy))
            row: Any = connection.execute("select job_id, state_sha256 from registry.rounds").fetchone()
            chunks = connection.execute(
                "select content from registry.blob_chunks where sha256 = %s order by position", row[1:]
            ).fetchall()
        return tables, b"".join(bytes(chunk[0]) for chunk in chunks), str(row[0])
    finally:
        stack.postgres.stop()
        guard.close()


def encodings(values: NDArray[Any]) -> Iterator[bytes]:
    """Every two neighbouring values that are not zero, in the encodings that a program would use; and single ones as
    text, where they have enough digits to be unmistakable.
    """
    kinds = ("<i8", ">i8") if values.dtype.kind == "i" else ("<f4", "<f8", ">f4", ">f8")
    for first, second in itertools.pairwise(values):
        if abs(first) > 1e-6 and abs(second) > 1e-6:
            for kind in kinds:
                yield np.array([first, second]).astype(kind).tobytes()
    for value in values:
        text = str(abs(value)) if values.dtype.kind == "i" else f"{abs(float(value)):.9f}"[:9]
        if len(text) >= 9 and abs(value) > 1e-3:
            yield text.encode()


@pytest.fixture(scope="module")
def final(run: Run) -> bytes:
    """The model, as a hospital can open it."""
    home = run.stack.hospital_data("hospital-00")
    keys = EpochFiles(home).load(load_roster_file(run.stack.roster_file).sha256, 1)
    assert keys is not None
    return open_newest(keys, run.job_id, 1, run.sealed)[1]


@pytest.fixture(scope="module")
def trainers(run: Run) -> list[Trainer]:
    """Each hospital's part, computed anew from its file."""
    plan = choose_plan(DemoOptions(run.folder, privacy=None, rounds=1))
    data = run.folder / "data" / "synthetic"
    sets = [
        read_dataset(
            data / "diabetic_data.parquet",
            plan,
            partition=PartitionFile(path=data / "partition15.csv", hospital=str(number)),
        )
        for number in range(HOSPITALS)
    ]
    return [Trainer(plan, dataset, run.folder / "stack" / "compiled") for dataset in sets]


def test_the_search_finds_what_is_there(run: Run) -> None:
    """The sealed state in the database, and the job in Redis, tables, logs and spans."""
    sealed = run.sealed[OVERHEAD_BYTES : OVERHEAD_BYTES + 64]
    assert any(name.startswith("postgres/") for name in run.found([sealed]))
    assert "table registry.blob_chunks" in run.found([sealed])
    named = run.found([run.job_id.encode()])
    for part in ("redis/", "run/coordinator", "traces/", "postgres/"):
        assert any(name.startswith(part) for name in named), part
    assert next(iter(encodings(np.array([1.5, 2.5], dtype=np.float32)))) == np.array([1.5, 2.5], dtype="<f4").tobytes()


@pytest.mark.parametrize("place", [0, 5, 16, 39])
def test_the_search_finds_a_needle_at_any_place(place: int) -> None:
    needle, content = bytes(range(100, 124)), bytearray(63)
    beginnings = np.frombuffer(needle[:WORD], dtype="<u8")
    assert not _stands_in(bytes(content), beginnings, (needle,))
    content[place : place + len(needle)] = needle
    assert _stands_in(bytes(content), beginnings, (needle,))
    content[place + WORD] ^= 1
    assert not _stands_in(bytes(content), beginnings, (needle,))


def test_no_model_is_in_the_centre(run: Run, final: bytes) -> None:
    state = read_state(final)
    assert np.abs(state.weights).max() > 1e-3
    parts = itertools.chain(*map(encodings, (state.weights, state.velocity, state.average)))
    assert run.found([*parts, final[:64], b"FMSTATE1"]) == []


def test_no_sum_and_no_update_is_in_the_centre(run: Run, final: bytes, trainers: list[Trainer]) -> None:
    start = trainers[0].initial_state()
    updates = [np.asarray(trainer.contribution(start, 1)) for trainer in trainers]
    total = np.sum(updates, axis=0)
    assert trainers[0].update(start, total, HOSPITALS) == final, "this is the sum that was opened"
    assert run.found(itertools.chain(*map(encodings, (total, *updates)))) == []


def test_no_key_of_hospitals_is_in_the_centre(run: Run) -> None:
    roster = load_roster_file(run.stack.roster_file)
    keys = list[bytes]()
    for name in roster.ids:
        home = run.stack.hospital_data(name)
        own, shared = MemberKeys.load(home / "member.keys"), EpochFiles(home).load(roster.sha256, 1)
        assert shared is not None
        keys += [own.signing.private_bytes_raw(), own.sealing.private_bytes_raw(), shared.state_key]
        keys += [shared.group_key[start : start + 32] for start in range(64, len(shared.group_key) - 32, 4096)]
    assert run.found([*keys, *(key.hex().encode() for key in keys)]) == []
