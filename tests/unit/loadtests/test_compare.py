"""The comparison with the peers: which ratio is held against which limit, and what fails it."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.peers.compare import Ratio, compare
from services.common.errors import Code, FedmeshError


def fedmesh(params: int, lanes: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "params": params,
        "hospitals": 15,
        "lanes": lanes,
        "upload_bytes_per_parameter": {2_048: 16.0}.get(params, 4.1 if lanes == 2 else 8.2),
        "download_bytes_per_parameter": 8.1,
        "round_s": {"p50": 2.0, "p99": 2.5},
        "phase_s": {"upload": 1.0},
        "centre_cpu_s": 0.5,
        "centre_adding_cpu_s": 0.4,
        "hospital_cpu_s": 0.4,
        "aggregator_peak_extra_mb": 20.0,
        "add_over_bandwidth_bound": 12.0,
        "exact": True,
        **changes,
    }


def all_reports() -> list[dict[str, Any]]:
    return [fedmesh(2_048), fedmesh(100_000), fedmesh(1_000_000), fedmesh(1_000_000, lanes=1)]


def peers() -> dict[str, Any]:
    def rounds(seconds: float) -> dict[str, Any]:
        row = {"round_s": {"p50": seconds, "p99": seconds, "runs": 3}, "upload_bytes_per_parameter": 8.1, "exact": True}
        return {str(size): copy.deepcopy(row) for size in (2_048, 100_000, 1_000_000)}

    sums = {str(size): {"centre_cpu_s": 4.0, "exact": True} for size in (2_048, 100_000, 1_000_000)}
    return {
        "hospitals": 15,
        "flower": {"params": rounds(80.0), "protocol_alone": {"params": rounds(4.0)}},
        "nvflare": {"params": sums},
    }


def named(ratios: list[Ratio], part: str) -> Ratio:
    [found] = [ratio for ratio in ratios if part in ratio.name]
    return found


def test_good_figures_keep_every_limit() -> None:
    ratios, ok = compare(all_reports(), peers())

    assert ok
    assert all(ratio.ok for ratio in ratios)
    assert named(ratios, "NVFlare's centre").value == pytest.approx(8.0)
    assert named(ratios, "of adding").value == pytest.approx(10.0)
    assert named(ratios, "Flower's, 1M").value == pytest.approx(2.0 / 80.0)
    assert named(ratios, "alone, 1M").value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("place", "change", "name"),
    [
        (2, {"upload_bytes_per_parameter": 4.21}, "1M, 2 lanes"),
        (3, {"upload_bytes_per_parameter": 8.41}, "1M, 1 lane"),
        (0, {"upload_bytes_per_parameter": 20.1}, "2,048"),
        (1, {"round_s": {"p50": 80.1, "p99": 90.0}}, "Flower's, 100k"),
        (3, {"round_s": {"p50": 80.1, "p99": 90.0}}, "Flower's, 1M"),
        (2, {"centre_cpu_s": 0.81}, "NVFlare's centre"),
        (3, {"add_over_bandwidth_bound": 40.1}, "bandwidth"),
        (1, {"exact": False}, "right"),
    ],
)
def test_each_requirement_is_missed_by_itself(place: int, change: dict[str, Any], name: str) -> None:
    reports = all_reports()
    reports[place] |= change

    ratios, ok = compare(reports, peers())

    assert not ok
    assert {ratio.name for ratio in ratios if ratio.required and not ratio.ok} == {named(ratios, name).name}


def test_a_figure_at_its_limit_keeps_it() -> None:
    reports = all_reports()
    reports[2] |= {"upload_bytes_per_parameter": 4.2, "centre_cpu_s": 0.8, "add_over_bandwidth_bound": 40.0}
    reports[1]["round_s"] = {"p50": 80.0, "p99": 80.0}

    assert compare(reports, peers())[1]


def test_being_slower_than_flowers_protocol_alone_is_told_but_does_not_fail() -> None:
    reports = all_reports()
    reports[2]["round_s"] = {"p50": 5.0, "p99": 6.0}

    ratios, ok = compare(reports, peers())

    assert ok
    assert not named(ratios, "alone, 1M").ok


def test_without_a_deployment_flowers_protocol_alone_is_what_counts() -> None:
    without, slow = peers(), all_reports()
    without["flower"]["params"] = {}
    slow[2]["round_s"] = {"p50": 5.0, "p99": 6.0}

    assert compare(all_reports(), without)[1]
    ratios, ok = compare(slow, without)
    assert not ok
    assert [ratio.name for ratio in ratios if ratio.required and not ratio.ok] == [named(ratios, "alone, 1M").name]


def test_what_was_not_measured_fails() -> None:
    ratios, ok = compare(fedmesh(1_000_000), peers())

    assert not ok
    assert named(ratios, "1M, 1 lane").value is None
    assert named(ratios, "2,048").value is None
    assert not compare(all_reports(), {"hospitals": 15, "flower": peers()["flower"]})[1]
    assert not compare(all_reports(), {"hospitals": 15, "nvflare": peers()["nvflare"]})[1]


def test_a_peer_with_a_wrong_sum_fails() -> None:
    wrong = peers()
    wrong["flower"]["params"]["1000000"]["exact"] = False

    assert not compare(all_reports(), wrong)[1]


def test_other_numbers_of_hospitals_are_refused() -> None:
    with pytest.raises(FedmeshError, match="the peers with 15") as caught:
        compare(fedmesh(1_000_000, hospitals=5), peers())
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_report_without_a_field_is_refused() -> None:
    report = fedmesh(1_000_000)
    del report["centre_cpu_s"]
    with pytest.raises(FedmeshError, match="centre_cpu_s"):
        compare(report, peers())


@pytest.mark.parametrize(("upload", "code"), [(4.1, 0), (5.0, 1)])
def test_the_command_prints_the_ratios_last_and_fails_when_one_is_missed(
    tmp_path: Path, upload: float, code: int
) -> None:
    reports = all_reports()
    reports[2]["upload_bytes_per_parameter"] = upload
    (tmp_path / "fedmesh.json").write_text(json.dumps(reports[:3]))
    (tmp_path / "one-lane.json").write_text(json.dumps(reports[3]))
    (tmp_path / "peers.json").write_text(json.dumps(peers()))

    done = subprocess.run(
        [sys.executable, "-m", "loadtests.peers.compare"]
        + [str(tmp_path / name) for name in ("peers.json", "fedmesh.json", "one-lane.json")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )

    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"ratios: upload bytes/parameter, 1M, 2 lanes: {upload:.3g};")
