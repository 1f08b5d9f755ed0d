"""What benchmarks compare themselves with, and the judgement of their targets."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from services.bench.audit_log import AuditLogReport, proofs_per_s
from services.bench.bounds import fdatasync_rate, quantiles_ms, repeat
from services.bench.registry_load import RegistryReport, open_loop
from services.bench.row_security import ALL, SAME
from services.common.errors import Code, FedmeshError

GOOD = AuditLogReport(
    appenders=50,
    events=20,
    seconds=20,
    one_per_s=500,
    one_ms={"p50": 9, "p99": 149},
    one_cpu_ms=3,
    many_per_s=900,
    many_ms={"p50": 9, "p99": 149},
    many_cpu_ms=1,
    plain_per_s=300,
    plain_ms={"p50": 9, "p99": 99},
    plain_cpu_ms=4,
    plain_many_per_s=600,
    plain_many_cpu_ms=2,
    calls_per_s=1000,
    calls_cpu_ms=1,
    log_per_s=1500,
    log_ms={"p50": 5, "p99": 50},
    inserts_per_s=1000,
    fdatasyncs_per_s=100,
    load=1,
    tree_size=1000,
    proofs_per_s=20_000,
)


def test_a_disk_has_a_rate_and_keeps_nothing(tmp_path: Path) -> None:
    assert fdatasync_rate(tmp_path, 0.01) > 0
    assert list(tmp_path.iterdir()) == []


def test_workers_take_turns_until_the_time_is_over() -> None:
    seen: set[int] = set()

    async def work(worker: int) -> None:
        seen.add(worker)
        await asyncio.sleep(0)

    latencies = asyncio.run(repeat(work, 3, 0.05))
    assert seen == {0, 1, 2}
    assert latencies


def test_work_that_ends_late_counts() -> None:
    async def work(_worker: int) -> None:
        await asyncio.sleep(0.02)

    assert len(asyncio.run(repeat(work, 3, 0.001))) == 3


def test_what_fails_ends_the_measurement() -> None:
    async def work(_worker: int) -> None:
        raise RuntimeError("refused")

    with pytest.raises(ExceptionGroup):
        asyncio.run(repeat(work, 2, 5))


def test_quantiles_are_milliseconds() -> None:
    latencies = [number / 1000 for number in range(101)]
    random.Random(1).shuffle(latencies)
    assert quantiles_ms(latencies) == pytest.approx({"p50": 50, "p99": 99})


def test_proofs_of_a_tree_that_is_not_a_power_of_two_verify() -> None:
    assert proofs_per_s(1001, 50) > 0


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"one_per_s": 499}, ["appends for each fdatasync, calls of one event"]),
        ({"fdatasyncs_per_s": 101}, ["appends for each fdatasync, calls of one event"]),
        ({"fdatasyncs_per_s": 181}, [f"appends for each fdatasync, calls of {n}" for n in ("one event", "20 events")]),
        ({"plain_per_s": 334}, ["appends for each plain insert, both by calls of one event"]),
        ({"plain_many_per_s": 601}, ["appends for each plain insert, both by calls of 20 events"]),
        ({"inserts_per_s": 1001}, ["appends for each plain insert, both without calls"]),
        ({"one_ms": {"p50": 9, "p99": 150}}, ["calls of one event, p99, ms"]),
        ({"many_ms": {"p50": 9, "p99": 150}}, ["calls of 20 events, p99, ms"]),
        ({"proofs_per_s": 19_999}, ["proofs verified a second, one core"]),
    ],
)
def test_each_target_of_the_log_is_judged(change: dict[str, object], missed: list[str]) -> None:
    report = replace(GOOD, **change)  # type: ignore[arg-type]
    assert [name for name, (_, _, kept) in report.targets().items() if not kept] == missed


def test_each_target_of_the_registry_is_judged() -> None:
    report = RegistryReport(
        versions=1,
        metrics=1,
        database_bytes=1,
        fill_s=1,
        rate=100,
        seconds=1,
        cores=2,
        load=1,
        cpu_ms=1,
        failed=0,
        point_ms={"p50": 1, "p99": 20},
        page_ms={"a": {"p50": 1, "p99": 49}, "b": {"p50": 1, "p99": 50}},
        row_security={"a": {SAME: 1.29, ALL: 9.0}, "b": {SAME: 1.3, ALL: 1.0}},
    )
    assert [kept for _, _, kept in report.targets().values()] == [False, True, False, True, False, True]
    assert not replace(report, failed=1).targets()["reads without an answer"][2]


def test_reads_are_sent_when_due_whether_or_not_others_are_answered() -> None:
    """The first read is held until the last one was sent: who waited for answers would never send that."""
    sent: list[int] = []
    last = asyncio.Event()

    async def first() -> None:
        sent.append(0)
        if len(sent) == 1:
            await last.wait()

    async def second() -> None:
        sent.append(1)
        if len(sent) == 8:
            last.set()

    latencies, failed = asyncio.run(open_loop([first, second], 1000.0, 0.008))
    assert sent == [0, 1] * 4
    assert [len(found) for found in latencies] == [4, 4]
    assert max(latencies[0]) >= 0.007
    assert failed == 0


def test_reads_that_are_shed_are_counted_and_others_end_the_measurement() -> None:
    codes = iter([Code.STORE_UNAVAILABLE, Code.STORE_UNAVAILABLE, Code.NOT_FOUND])

    async def shed() -> None:
        raise FedmeshError(next(codes), "why")

    async def answered() -> None:
        return None

    latencies, failed = asyncio.run(open_loop([shed, answered], 1000.0, 0.004))
    assert (failed, [len(found) for found in latencies]) == (2, [2, 2])
    with pytest.raises(ExceptionGroup):
        asyncio.run(open_loop([shed, answered], 1000.0, 0.004))
