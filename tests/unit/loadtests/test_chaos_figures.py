"""Figures, targets, report, schedule and names of `make chaos`."""

import itertools
import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests.chaos.faults import chosen
from loadtests.chaos.faults_network import ALL
from loadtests.chaos.figures import Figures, Window, judge, measure, outages
from loadtests.chaos.names import answer
from loadtests.chaos.records import Appender, Call, read_calls, rows
from loadtests.chaos.report import timeline, write_report
from loadtests.chaos.rules import Line, Rule, line
from loadtests.chaos.schedule import arrivals, mixture
from loadtests.chaos.settings import Options, Targets

KILL = Window("postgres-kill", "postgres", "postgres-1", "postgres", start=100.0, whole=110.0)


def quiet_calls() -> list[Call]:
    return [Call(at=float(second), latency_ms=10.0, kind="a.B", status="OK") for second in range(200)]


def figures(calls: list[Call], windows: list[Window], writes: list[float]) -> Figures:
    return measure(calls, windows, {"postgres": writes, "redis": []}, [90.0, 104.0, 120.0], {})


def test_failed_calls_and_the_slow_ones_of_a_fault_are_counted_where_they_belong() -> None:
    calls = quiet_calls()
    calls[102] = Call(102.0, 9_000.0, "a.B", "UNAVAILABLE")
    calls[104] = Call(104.0, 700.0, "a.B", "OK")
    calls[101] = Call(101.0, 800.0, "a.B", "OK")
    found = figures(calls, [KILL], [99.0, 99.9, 102.4, 103.0])
    assert (found.calls, found.failed, found.failed_ratio) == (200, 1, 0.005)
    assert found.p99_quiet_ms == 10.0
    (fault,) = found.faults
    assert (fault.count, fault.calls, fault.failed, fault.recovered_s) == (1, 14, 1, 4.0)
    assert fault.outage_s == pytest.approx(2.5)
    assert found.postgres_outage_s == found.postgres_kill_outage_s == pytest.approx(2.5)
    assert found.redis_outage_s is None
    # The store was back at 102.4, the next round came at 104.
    assert fault.rounds_s == pytest.approx(1.6)
    # 101.0 and 102.0 lie in the outage and are left out; 104.0 does not, but one of 198 is no hundredth.
    assert found.p99_ms == 10.0
    assert found.p99_all_ms == 700.0


def test_only_the_statuses_of_the_error_budget_count_as_failed() -> None:
    statuses = [
        "OK",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
        "INTERNAL",
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "ABORTED",
    ]
    calls = [Call(float(number), 1.0, "a.B", status) for number, status in enumerate(statuses)]
    assert [call.failed for call in calls] == [False] * 3 + [True] * 4


def test_an_outage_is_a_pause_of_a_second_while_the_store_is_stopped() -> None:
    writes = [99.0, 99.1, 100.0, 101.0, 101.1, 130.0]
    assert outages(writes, [KILL]) == [(100.0, 101.0), (101.1, 130.0)]
    assert outages(writes, []) == []


def test_a_store_is_back_when_the_last_of_its_outages_is_over() -> None:
    (fault,) = figures(quiet_calls(), [KILL], [99.9, 102.0, 102.1, 103.2, 111.0]).faults
    assert fault.outage_s == pytest.approx(7.8)
    # Rounds were committed at 104 and 120.
    assert fault.rounds_s == pytest.approx(9.0)
    (fault,) = figures(quiet_calls(), [KILL], [99.9, 102.0, 102.1, 103.2, 103.3]).faults
    assert fault.outage_s == pytest.approx(2.1)
    assert fault.rounds_s == pytest.approx(0.8)


def test_slow_calls_in_a_pause_of_a_store_that_no_fault_explains_count() -> None:
    calls = quiet_calls()
    calls[150:160] = [Call(float(second), 900.0, "a.B", "OK") for second in range(150, 160)]
    assert figures(calls, [KILL], [99.9, 101.0, 149.0, 161.0]).p99_ms == 900.0


def test_a_fault_that_a_full_run_skips_is_missed(tmp_path: Path) -> None:
    found = measure(quiet_calls(), [], {}, [], {"disk-full": "takes root"})
    assert not [
        text for text in judge(found, Options(folder=tmp_path, calls=10, repeats=1), Targets()) if "disk" in text
    ]
    full = [text for text in judge(found, Options(folder=tmp_path), Targets()) if "disk" in text]
    assert full == ["disk-full: skipped, takes root"]


def test_what_misses_its_target_is_named(tmp_path: Path) -> None:
    calls = quiet_calls()
    calls[102] = Call(102.0, 9_000.0, "a.B", "UNAVAILABLE")
    found = figures(calls, [KILL], [99.0, 103.5])
    found.lost = 1
    short = Options(folder=tmp_path, calls=10, repeats=1)
    missed = judge(found, short, Targets())
    assert [text.split(":")[0] for text in missed] == [
        "share of failed calls",
        "lost",
        "PostgreSQL without a writer after a process kill, s",
    ]
    full = judge(found, Options(folder=tmp_path), Targets())
    assert {"calls: 200, at least 100000", "postgres-kill: came 1 times, at least 3"} <= set(full)
    assert any(text.startswith("share of faults: 0.05") for text in full)


def test_the_report_says_what_json_says_and_draws_every_fault(tmp_path: Path) -> None:
    calls = quiet_calls()
    found = figures(calls, [KILL], [99.0, 103.5])
    found.missed = judge(found, Options(folder=tmp_path, calls=10), Targets())
    found.notes = ["<b>not markup</b>"]
    document, page = write_report(tmp_path / "out.json", found, calls, [KILL], Targets())
    read = json.loads(document.read_text())
    wanted = "calls failed failed_ratio p50_ms p99_ms p99_quiet_ms lost doubled postgres_outage_s redis_outage_s faults"
    assert set(wanted.split()) <= set(read)
    assert {"name", "target", "count", "calls", "failed", "p99", "recovered_s"} <= set(read["faults"][0])
    text = page.read_text()
    assert "Missed:" in text
    assert "postgres-1" in text
    assert "<b>not" not in text
    picture = ElementTree.fromstring(timeline(calls, [KILL]))  # well-formed
    assert [title.text for title in picture.iter("title")] == ["postgres-kill: postgres-1, 10.0 s"]


def test_records_are_read_back_without_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    assert list(rows(path)) == []
    with Appender(path) as log:
        log.add(1.5, 20.0, "a.B", "OK")
    with path.open("a") as file:
        file.write("[2.5, 20")
    assert read_calls(path) == [Call(1.5, 20.0, "a.B", "OK")]


def test_arrivals_are_as_many_as_asked_and_always_the_same() -> None:
    times = list(itertools.takewhile(lambda at: at < 100, arrivals(50.0, seed=1)))
    assert 4_600 < len(times) < 5_400
    assert times == sorted(times)
    assert times[:100] == list(itertools.islice(arrivals(50.0, seed=1), 100))


def test_the_mixture_has_its_weights() -> None:
    names = list(itertools.islice(mixture({"a": 3, "b": 1}, seed=1), 4_000))
    assert 2_850 < names.count("a") < 3_150


def test_rules_add_up_for_whom_they_are_meant() -> None:
    rules = [
        Rule(target="registry-1", delay_s=0.1),
        Rule(target="registry-1", stall_share=0.01, stall_s=0.3),
        Rule(sources=(7,), cut=True),
    ]
    assert line(rules, "registry-1", 8) == Line(delay_s=0.1, stall_share=0.01, stall_s=0.3)
    assert line(rules, "audit-1", 7) == Line(cut=True)
    assert line(rules, "audit-1", None) == Line()
    assert [Rule.parse(rule.wire()) for rule in rules] == rules


def question(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34\x01\x00" + struct.pack(">HHHH", 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def test_a_name_has_the_addresses_of_all_replicas() -> None:
    reply = answer(question("Registry.chaos.test"), {"registry.chaos.test": ["127.77.1.1", "127.77.1.2"]})
    assert reply[:2] == b"\x12\x34"
    assert struct.unpack(">HH", reply[6:10]) == (2, 0)
    assert reply.endswith(bytes([127, 77, 1, 2]))


def test_other_names_do_not_exist_and_other_kinds_are_empty() -> None:
    known = {"registry.chaos.test": ["127.77.1.1"]}
    assert answer(question("nobody.chaos.test"), known)[3] & 0x0F == 3
    ipv6 = answer(question("registry.chaos.test", kind=28), known)
    assert (ipv6[3] & 0x0F, struct.unpack(">H", ipv6[6:8])[0]) == (0, 0)


def test_faults_are_chosen_by_name_and_by_group() -> None:
    assert len(chosen([], ALL)) == len(ALL) == len({fault.name for fault in ALL})
    assert {fault.name for fault in chosen(["redis-kill", "kill"], ALL)} == {
        "redis-kill",
        *(f"kill-{service}" for service in ("registry", "audit", "aggregator", "coordinator")),
    }
    with pytest.raises(KeyError, match="nonsense"):
        chosen(["nonsense"], ALL)
