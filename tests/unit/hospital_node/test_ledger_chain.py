"""The ledger's chain and its second head: what was altered, deleted, put back or cut short by a kill is noticed."""

import json
import multiprocessing
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Reservation
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import LEDGER_FILE, SqliteLedger, read_ledger
from services.hospital_node.store.ledger_chain import HEAD_FILE
from services.privacy.budget import Limit

LIMIT = Limit(epsilon=0.5, delta=1e-5)
ROOT = Path(__file__).parents[3]


def reservation(job: str, epsilon: float = 0.5) -> Reservation:
    return Reservation(job, "a" * 64, "north", True, epsilon, 1e-6, 4, 3, 2, ("h1", "h2"), "d" * 64)


def attempt(job: str, number: int) -> AttemptId:
    return AttemptId(job, 1, number)


def opened(folder: Path, clock: FakeClock | None = None) -> SqliteLedger:
    return SqliteLedger(folder, clock or FakeClock(), LIMIT)


def spent(folder: Path) -> SqliteLedger:
    """A ledger with a job of 0.3 of which two attempts were charged, and one that was released."""
    ledger = opened(folder)
    ledger.reserve(reservation("one", 0.3))
    ledger.charge(attempt("one", 1), measured=True)
    ledger.reserve(reservation("two", 0.1))
    ledger.release("two")
    ledger.charge(attempt("one", 2), measured=False)
    return ledger


def refused(function: Callable[[], Any]) -> str:
    with pytest.raises(FedmeshError) as caught:
        function()
    assert caught.value.code is Code.CONFIG_INVALID
    return caught.value.message


def copy(folder: Path, name: str) -> Path:
    """A consistent copy of a ledger without its second head, as a backup of the file would be."""
    path = folder / name
    with sqlite3.connect(folder / LEDGER_FILE) as source, sqlite3.connect(path) as target:
        source.backup(target)
    source.close()
    target.close()
    return path


def put_back(folder: Path, backup: Path) -> None:
    for leftover in folder.glob(f"{LEDGER_FILE}*"):
        leftover.unlink()
    shutil.copy(backup, folder / LEDGER_FILE)


def test_a_ledger_is_opened_again_as_it_was(tmp_path: Path) -> None:
    ledger = spent(tmp_path)
    assert ledger.head().seq == 5
    assert opened(tmp_path).head() == ledger.head()
    assert opened(tmp_path).left("north") == pytest.approx(0.2)
    kinds = [json.loads(entry.body)["kind"] for entry in ledger.entries_after(0, 10)]
    assert kinds == ["reserved", "charged", "reserved", "released", "charged"]
    assert [entry.seq for entry in ledger.entries_after(2, 2)] == [3, 4]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE reservations SET epsilon = 0.1 WHERE job_id = 'one'",
        "UPDATE reservations SET released_at = '2026-01-01' WHERE job_id = 'one'",
        "UPDATE reservations SET population = 'south'",
        "DELETE FROM charges WHERE attempt = 2",
        "UPDATE charges SET charged_at = '2020-01-01T00:00:00+00:00'",
        "INSERT INTO charges VALUES ('one', 1, 3, 0, '2026-01-01T00:00:00+00:00')",
        "DELETE FROM entries WHERE seq = 3",
        "DELETE FROM entries WHERE seq = 5",
        "UPDATE entries SET body = cast(replace(cast(body AS TEXT), '0.3', '0.1') AS BLOB)",
        "DELETE FROM entries",
    ],
)
def test_what_was_altered_is_noticed(tmp_path: Path, change: str) -> None:
    spent(tmp_path)
    with sqlite3.connect(tmp_path / LEDGER_FILE) as connection:
        assert connection.execute(change).rowcount
    connection.close()
    assert "never delete" in refused(lambda: opened(tmp_path))


def test_an_old_copy_is_noticed_before_and_while_it_runs(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.reserve(reservation("one", 0.3))
    backup = copy(tmp_path, "backup")
    ledger.charge(attempt("one", 1), measured=False)
    newest = copy(tmp_path, "newest")
    put_back(tmp_path, backup)
    message = refused(lambda: opened(tmp_path))
    assert "ends with entry 1, and entry 2 was written" in message
    put_back(tmp_path, newest)
    whole = opened(tmp_path)
    assert read_ledger(tmp_path)[0].charged == 1
    # Put back under a node that runs.
    with sqlite3.connect(backup) as source, sqlite3.connect(tmp_path / LEDGER_FILE) as target:
        source.backup(target)
    source.close()
    target.close()
    assert "entry 2 was written" in refused(lambda: whole.charge(attempt("one", 1), measured=False))
    assert "entry 2 was written" in refused(lambda: whole.reserve(reservation("two", 0.1)))


def test_a_deleted_ledger_is_not_made_anew(tmp_path: Path) -> None:
    spent(tmp_path)
    for leftover in tmp_path.glob(f"{LEDGER_FILE}*"):
        leftover.unlink()
    assert "ends with entry 0, and entry 5 was written" in refused(lambda: opened(tmp_path))


def test_a_copy_that_went_another_way_is_noticed(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.reserve(reservation("one", 0.3))
    backup = copy(tmp_path, "backup")
    ledger.charge(attempt("one", 1), measured=False)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(backup, other / LEDGER_FILE)
    opened(other).release("one")
    put_back(tmp_path, copy(other, "forked"))
    assert "entry 2 was written" in refused(lambda: opened(tmp_path))


def test_a_lost_second_head_is_made_again(tmp_path: Path) -> None:
    spent(tmp_path)
    for leftover in tmp_path.glob(f"{HEAD_FILE}*"):
        leftover.unlink()
    ledger = opened(tmp_path)
    backup = copy(tmp_path, "backup")
    ledger.charge(attempt("one", 3), measured=False)
    put_back(tmp_path, backup)
    refused(lambda: opened(tmp_path))


def test_a_clock_that_is_set_back_gives_nothing_back(tmp_path: Path) -> None:
    clock = FakeClock(datetime(2026, 6, 1, tzinfo=UTC))
    ledger = opened(tmp_path, clock)
    ledger.reserve(reservation("one"))
    clock.advance(-timedelta(days=2000).total_seconds())
    # Dated by this clock alone, the charge would be out of the window as soon as the clock is right again.
    ledger.charge(attempt("one", 1), measured=False)
    assert ledger.left("north") == 0
    clock.advance(timedelta(days=2100).total_seconds())
    assert ledger.left("north") == 0
    clock.advance(timedelta(days=264).total_seconds())
    assert ledger.left("north") == 0
    clock.advance(timedelta(days=2).total_seconds())
    assert ledger.left("north") == 0.5


def test_a_ledger_from_before_the_chain_is_taken_over(tmp_path: Path) -> None:
    spent(tmp_path)
    with sqlite3.connect(tmp_path / LEDGER_FILE) as connection:
        connection.execute("DROP TABLE entries")
        connection.execute("DROP TABLE recoveries")
        connection.execute("ALTER TABLE reservations DROP COLUMN recovered_at")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    for leftover in tmp_path.glob(f"{HEAD_FILE}*"):
        leftover.unlink()
    ledger = opened(tmp_path)
    assert ledger.head().seq == 5
    assert ledger.left("north") == pytest.approx(0.2)
    ledger.charge(attempt("one", 3), measured=False)
    assert opened(tmp_path).head().seq == 6


_KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from services.common.clock import FakeClock
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.ledger import SqliteLedger
from services.privacy.budget import Limit

folder, children = Path(sys.argv[1]), int(sys.argv[2])
connect = sqlite3.connect
for number in range(children):
    child = os.fork()
    if child == 0:
        left = [2 * number]
        def count(statement):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        ledger = SqliteLedger(folder / str(number), FakeClock(), Limit(0.5, 1e-5))
        def traced(*args, **kwargs):
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(count)
            return connection
        # New connections from here on: those that were opened before are used up.
        sqlite3.connect = traced
        ledger._database._idle.clear()
        ledger._kept._database._idle.clear()
        ledger.charge(AttemptId("one", 1, 1), measured=False)
        os.write(1, b"%d returned\\n" % number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.write(1, b"%d %s\\n" % (number, b"killed" if os.WIFSIGNALED(status) else b"exited"))
"""


def test_killed_before_any_statement_of_a_charge(tmp_path: Path) -> None:
    """SIGKILL before every second SQL statement of a charge: it is there whole or not at all, nothing is refused."""
    children = 17
    made = tmp_path / "made"
    made.mkdir()
    opened(made).reserve(reservation("one"))
    for number in range(children):
        shutil.copytree(made, tmp_path / str(number))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(children)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    lines = set(done.stdout.splitlines())
    killed = {number for number in range(children) if f"{number} killed" in lines}
    # The last ones have more statements to spare than a charge has: all of them, and only they, came to the end.
    assert killed == set(range(len(killed)))
    assert 5 < len(killed) < children
    charged = []
    for number in range(children):
        folder = tmp_path / str(number)
        ledger = opened(folder)
        charged.append(read_ledger(folder)[0].charged)
        if number not in killed:
            assert f"{number} returned" in lines
            assert charged[-1] == 1
        assert not (charged[-1] and ledger.release("one"))
        assert ledger.left("north") == 0 or charged[-1] == 0
        ledger.reserve(reservation("one"))
        ledger.charge(attempt("one", 1), measured=False)
        assert read_ledger(folder)[0].charged == 1
    # Killed early it is not there, killed late it is, and there is one point between.
    assert sorted(charged) == charged
    assert charged[0] == 0
    assert charged[len(killed) - 1] == 1


def _spend_in_process(folder: str, worker: int, barrier: Any, results: Any) -> None:
    """Take jobs of 0.1 and charge all their attempts, as fast as it goes."""
    ledger = SqliteLedger(Path(folder), FakeClock(datetime.now(UTC)), LIMIT)
    barrier.wait()
    taken = []
    for number in range(4):
        job = f"{worker}-{number}"
        try:
            ledger.reserve(reservation(job, 0.1))
        except FedmeshError as error:
            if error.code is not Code.BUDGET_EXHAUSTED:
                raise
            continue
        taken.append(job)
        for charge in (1, 2, 3):
            ledger.charge(attempt(job, charge), measured=False)
    results.put(taken)


def test_processes_that_spend_at_once_spend_the_limit_and_no_more(tmp_path: Path) -> None:
    opened(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    workers = 3
    barrier, results = spawn.Barrier(workers), spawn.Queue()
    processes = [
        spawn.Process(target=_spend_in_process, args=(str(tmp_path), worker, barrier, results))
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    taken = [job for _ in processes for job in results.get(timeout=60)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(taken) == 5
    rows = read_ledger(tmp_path)
    assert sorted(row.job_id for row in rows) == sorted(taken)
    assert all(row.charged == 3 for row in rows)
    ledger = opened(tmp_path)
    assert ledger.head().seq == 5 * 4
    assert ledger.left("north") == 0
