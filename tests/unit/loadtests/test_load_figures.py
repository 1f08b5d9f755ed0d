"""What a load test concludes from its samples: costs, and what misses a limit."""

from pathlib import Path

import pytest

from loadtests.load.figures import Scenario, Usage, costs, missed, table
from loadtests.load.settings import Options, Sample

OPTIONS = Options(Path("unused"))


def scenario(
    name: str,
    streams: int,
    cores: float,
    *,
    mib: float = 50.0,
    calls: int = 100,
    ms: float = 5.0,
    size: int = 2**20,
) -> Scenario:
    samples = [Sample(name, "call", ms, "OK", size) for _ in range(calls)]
    usage = {"coordinator": Usage(cores / 2, mib), "postgres": Usage(cores / 2, 10.0)}
    return Scenario(name, streams, 10.0, samples, usage)


def run() -> list[Scenario]:
    return [
        scenario("idle-15", 15, 0.10, calls=0),
        scenario("calls-15", 15, 0.30),
        scenario("calls-65", 65, 0.405),
        scenario("idle-115", 115, 0.11, mib=60.0, calls=0),
        scenario("calls-115", 115, 0.31, mib=60.0),
        scenario("audit-storm", 115, 0.51),
        scenario("upload-storm-20000", 115, 1.11),
        scenario("upload-storm-200000", 115, 1.61, size=2**21),
    ]


def test_costs_are_differences_between_scenarios() -> None:
    found = costs(run())
    assert found.stream_cores == pytest.approx(0.0001)
    assert found.stream_mib == pytest.approx(0.1)
    # Beside 65 hospitals half of what a hundred more of them cost is no matter of the calls.
    assert found.call_cpu_s == pytest.approx({"15": 0.02, "65": 0.03, "115": 0.02})
    assert found.audit_cpu_s == pytest.approx(0.04)
    assert found.upload_cpu_s == pytest.approx({"20000": 0.1, "200000": 0.15})
    assert found.upload_mib == pytest.approx({"20000": 1.0, "200000": 2.0})
    assert found.upload_cpu_s_per_mib == pytest.approx({"20000": 0.1, "200000": 0.075})


def test_a_run_within_its_limits_misses_nothing() -> None:
    assert missed(run(), OPTIONS) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (scenario("calls-115", 115, 0.3, ms=700.0), "calls-115: p99 is 700 ms, the limit 500 ms"),
        (scenario("audit-storm", 115, 0.5, calls=0), "audit-storm: no call was made"),
        (scenario("calls-115", 115, 0.71), "a call beside 115 hospitals costs 3.0 times as much"),
        (scenario("idle-115", 115, 0.10, mib=150.0, calls=0), "a waiting hospital takes 1.00 MiB"),
        (scenario("idle-115", 115, 0.20, calls=0), "a waiting hospital takes 0.00100 cores"),
        (scenario("calls-65", 65, 0.705), "a call beside 65 hospitals costs 3.0 times as much"),
        (scenario("upload-storm-200000", 115, 6.0, size=2**21), "a MiB of 200000 integers costs 2.9 times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_over_a_limit_is_named(changed: Scenario, says: str) -> None:
    found = missed([changed if item.name == changed.name else item for item in run()], OPTIONS)
    assert [says in line for line in found] == [True]


def test_a_failed_call_in_a_thousand_is_too_many() -> None:
    changed = run()
    changed[1].samples[0] = Sample("calls-15", "call", 5.0, "UNAVAILABLE")
    assert missed(changed, OPTIONS) == ["calls-15: 1 of 100 calls failed"]
    # A refusal that the caller deserves is the service doing its work.
    changed[1].samples[0] = Sample("calls-15", "call", 5.0, "NOT_FOUND")
    assert missed(changed, OPTIONS) == []


def test_an_upload_may_take_longer_than_a_call() -> None:
    slow = scenario("upload-storm-200000", 115, 1.61, ms=3000.0)
    assert missed([*run()[:-1], slow], OPTIONS) == []


def test_the_table_names_every_scenario_and_cost() -> None:
    text = table(run())
    assert all(item.name in text for item in run())
    assert "0.100 thousandths of a core, 102 KiB" in text
    assert "20.0 ms beside 15, 30.0 ms beside 65, 20.0 ms beside 115 hospitals" in text
    assert "150 ms, 75 ms a MiB, of 200,000 integers (2.00 MiB)" in text
