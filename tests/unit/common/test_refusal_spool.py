"""What waits on disk for the audit log: across restarts, torn files, full disks and bounds."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.common.clock import SystemClock
from services.common.config import RefusalsConfig
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.refusal_book import Changes, Entry, Refusal, RefusalBook
from services.common.refusal_book import Kind as RefusalKind
from services.common.refusal_spool import DAMAGED, FILE, RefusalSpool, open_spool
from services.common.refusals import RefusalEvent
from tests.unit.common.test_refusals import Told, running

BYTES = 4 << 20


def entry(seq: int, reason: str = "why", *, growing: bool = False) -> Entry:
    at = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
    kind = RefusalKind("spiffe://test.local/hospital/north", "hospital/north", "S/M", "permission-denied", reason)
    return Entry(seq, f"id-{seq}", kind, 1, at, at, growing=growing, gathered=False)


def kept(folder: Path) -> list[Entry]:
    with closing(RefusalSpool(folder, BYTES)) as spool:
        return spool.kept


def copied(folder: Path, to: Path) -> Path:
    """The files as they lie there now: what a process that is killed in this moment leaves."""
    to.mkdir()
    for name in (FILE, f"{FILE}-wal"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_entries_come_back_as_they_were_in_their_order_without_those_that_are_over(tmp_path: Path) -> None:
    with closing(RefusalSpool(tmp_path, BYTES)) as spool:
        assert spool.kept == []
        spool.write(Changes([entry(2), entry(1), entry(3, growing=True)], []))
        spool.write(Changes([entry(3), entry(10)], [1]))
    assert kept(tmp_path) == [entry(2), entry(3), entry(10)]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("torn", [1, 300, 4096])
def test_what_was_written_in_part_is_not_there_and_what_came_before_is(tmp_path: Path, torn: int) -> None:
    with closing(RefusalSpool(tmp_path / "live", BYTES)) as spool:
        spool.write(Changes([entry(1)], []))
        spool.write(Changes([entry(2)], []))
        killed = copied(tmp_path / "live", tmp_path / "killed")
    assert kept(copied(killed, tmp_path / "whole")) == [entry(1), entry(2)]
    log = killed / f"{FILE}-wal"
    log.write_bytes(log.read_bytes()[:-torn])
    assert kept(killed) == [entry(1)]


def test_a_damaged_file_is_kept_aside_and_the_next_one_begun(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all" * 500)
    with closing(RefusalSpool(tmp_path, BYTES)) as spool:
        spool.write(Changes([entry(1)], []))
    assert (tmp_path / DAMAGED).read_bytes().startswith(b"no database")
    assert kept(tmp_path) == [entry(1)]


def test_a_file_of_another_release_is_kept_aside_too(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute("PRAGMA user_version = 2")
    assert kept(tmp_path) == []
    assert (tmp_path / DAMAGED).exists()


def test_a_full_disk_takes_nothing_of_a_write_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    with closing(RefusalSpool(tmp_path, 64 << 10)) as spool:
        spool.write(Changes([entry(1)], []))
        with pytest.raises(FedmeshError, match="full") as caught:
            spool.write(Changes([entry(seq, "x" * 1000) for seq in range(2, 100)], [1]))
        assert caught.value.code is Code.STORE_UNAVAILABLE
        spool.write(Changes([entry(2)], []))
    assert kept(tmp_path) == [entry(1), entry(2)]


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    with closing(RefusalSpool(tmp_path, BYTES)), pytest.raises(FedmeshError, match="locked"):
        RefusalSpool(tmp_path, BYTES)


def test_without_a_folder_that_can_be_used_refusals_wait_in_memory_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert open_spool(RefusalsConfig()) is None
    assert open_spool(RefusalsConfig(directory=tmp_path / "file" / "in it")) is None
    said = capsys.readouterr()
    assert (said.out + said.err).count("refusals_wait_in_memory") == 2


def test_the_worst_that_callers_can_do_stays_within_the_bytes_and_counts_every_refusal(tmp_path: Path) -> None:
    seconds = 0.0
    made = 0
    with closing(RefusalSpool(tmp_path, BYTES)) as spool:
        book = RefusalBook(SystemClock(), spool.most, now=lambda: seconds)
        for window in range(1, 4):
            for number in range(2 * spool.most):
                who = Identity("c" * 200, Kind.OPERATOR, f"{'o' * 50}{number % 500}")
                reason = "\N{GRINNING FACE}" * 290 + str(number // 500)
                book.note(Refusal(who, "S/M", Code.PERMISSION_DENIED, reason))
                made += 1
            seconds = window * 60.0
            spool.write(book.changes())
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= BYTES
    assert sum(item.count for item in kept(tmp_path)) == made


async def test_what_was_answered_before_a_kill_is_told_by_the_next_process_under_the_same_ids(tmp_path: Path) -> None:
    spool = RefusalSpool(tmp_path / "live", BYTES)
    first = Told(spool)
    await first.note(times=5)
    copied(tmp_path / "live", tmp_path / "killed")
    spool.close()
    before = kept(tmp_path / "killed")
    assert [item.count for item in before] == [1, 4]
    async with running(Told(RefusalSpool(tmp_path / "killed", BYTES))) as next_one:
        bodies = await next_one.holds(2)
        assert [(body["caller"], body["count"]) for body in bodies] == [
            ("spiffe://test.local/hospital/north", 1),
            ("spiffe://test.local/hospital/north", 4),
        ]
    assert [event.event_id for event in next_one.events] == [item.event_id for item in before]
    assert kept(tmp_path / "killed") == []


class TakenThenKilled(Told):
    """Its process is killed when the log has taken what it sends first, before it knows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(RefusalSpool(folder / "live", BYTES))
        self.folder = folder

    async def send(self, events: Sequence[RefusalEvent]) -> None:
        await super().send(events)
        if len(self.events) == len(events):
            copied(self.folder / "live", self.folder / "killed")


async def test_what_the_log_took_just_before_a_kill_is_sent_again_to_the_byte(tmp_path: Path) -> None:
    first = TakenThenKilled(tmp_path)
    await first.note(times=3)
    async with running(first):
        await first.holds(1)
    async with running(Told(RefusalSpool(tmp_path / "killed", BYTES))) as next_one:
        await next_one.holds(2)
    assert next_one.events == first.events
    assert [json.loads(event.body_json)["count"] for event in first.events] == [1, 2]


async def test_what_is_not_told_when_a_process_ends_in_good_order_is_on_disk(tmp_path: Path) -> None:
    told = Told(RefusalSpool(tmp_path, BYTES))
    told.errors = [FedmeshError(Code.SERVICE_UNAVAILABLE, "away")] * 1000
    async with running(told):
        await told.note(times=4)
    assert told.events == []
    assert [(item.count, item.growing) for item in kept(tmp_path)] == [(1, False), (3, False)]


class Watched(RefusalSpool):
    """Counts its writes; while it fails, they do as on a full disk."""

    writes = 0
    fails = False

    def write(self, changes: Changes) -> None:
        self.writes += 1
        if self.fails:
            raise FedmeshError(Code.STORE_UNAVAILABLE, "database or disk is full")
        super().write(changes)


async def test_refusals_that_come_at_once_share_a_write(tmp_path: Path) -> None:
    spool = Watched(tmp_path, BYTES)
    told = Told(spool)
    await asyncio.gather(*(told.note(caller=f"h{number % 9}") for number in range(900)))
    assert spool.writes <= 2
    spool.close()
    assert sum(item.count for item in kept(tmp_path)) == 900


async def test_while_the_disk_is_full_refusals_are_told_from_memory_and_written_once_there_is_room(
    tmp_path: Path,
) -> None:
    spool = Watched(tmp_path, BYTES)
    spool.fails = True
    told = Told(spool)
    await told.note(times=3)
    assert (spool.writes, failing()) == (1, 1.0)
    async with running(told):
        assert [body["count"] for body in await told.holds(1)] == [1]
        await told.note(caller="south")
        await told.holds(2)
        spool.fails = False
        async with asyncio.timeout(30):
            while failing():  # noqa: ASYNC110 - a gauge has no event
                await asyncio.sleep(0.01)
        await told.note()
        copied(tmp_path, tmp_path / "killed")
    assert [item.count for item in kept(tmp_path / "killed")] == [3]
    assert [json.loads(event.body_json)["count"] for event in told.events] == [1, 1, 3]


def failing() -> float:
    return REGISTRY.get_sample_value("fedmesh_access_refusals_disk_failing") or 0.0
