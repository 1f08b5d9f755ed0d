"""A short run of `make chaos` with one kill: everything is started, broken, compared, reported, and gone at the end."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_killed_registry_loses_nothing(tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "loadtests.chaos", "--faults", "kill-registry", "--repeats", "1", "--calls", "300"]
    command += ["--quiet", "5", "--hospitals", "4", "--clients", "4", "--rate", "10", "--dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--report", str(report)], cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert report.exists(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert (found["lost"], found["doubled"], found["inexact"]) == (0, 0, 0), found["notes"]
    assert found["calls"] >= 300
    assert found["checked"]["rounds"] >= 2
    (fault,) = found["faults"]
    assert (fault["name"], fault["target"], fault["count"]) == ("kill-registry", "registry-1", 1)
    # How fast it all was is a matter of the machine: that is for the exit code, and for a machine that is quiet.
    assert (done.returncode == 0) == (found["missed"] == []), done.stdout + done.stderr
    assert "<svg" in report.with_suffix(".html").read_text()
    running = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in running if str(tmp_path / "run") in command] == []


def test_a_fault_that_does_not_exist_is_refused_at_once() -> None:
    command = [sys.executable, "-m", "loadtests.chaos", "--faults", "earthquake"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no such fault or group: earthquake" in done.stderr
