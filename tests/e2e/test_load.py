"""A short `make loadtest`: every scenario is made, counted by Locust, and judged; nothing is left running."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtests.peers.environments import prepare

ROOT = Path(__file__).parents[2]
SCENARIOS = ["idle-15", "calls-15", "idle-30", "calls-30", "audit-storm", "upload-storm-2000", "upload-storm-20000"]
LOCUSTFILE = "loadtests/load/locustfile.py"


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_every_scenario_is_made_and_judged(tmp_path: Path) -> None:
    report = tmp_path / "load.json"
    command = [sys.executable, "-m", "loadtests.load", "--hospitals", "15,30", "--params", "2000,20000"]
    command += ["--seconds", "3", "--rate", "10", "--events", "10", "--dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--report", str(report)], cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert report.exists(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert [item["name"] for item in found["scenarios"]] == SCENARIOS
    by_name = {item["name"]: item for item in found["scenarios"]}
    assert by_name["idle-30"]["streams"] == 30
    made = [item for item in found["scenarios"] if not item["name"].startswith("idle")]
    assert all(item["calls"] > 0 for item in made)
    assert all(item["failed"] == 0 for item in made), found
    # Locust's table has them too; how fast it all was is a matter of the machine.
    assert "audit-storm audit.AppendEvents" in done.stdout + done.stderr
    assert (done.returncode == 0) == (found["missed"] == []), done.stdout + done.stderr
    running = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in running if str(tmp_path / "run") in command] == []


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_the_users_run_with_locusts_own_command(tmp_path: Path) -> None:
    home = prepare("locust", print, ROOT / "loadtests" / "load" / "requirements.txt")
    command = [str(home / "bin" / "locust"), "-f", LOCUSTFILE, "--fedmesh-python", sys.executable]
    command += ["--headless", "-u", "40", "-r", "40", "-t", "10s", "--params", "2000", "--json"]
    command += ["--fedmesh-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {item["name"]: item for item in json.loads(done.stdout)}
    # Ten of each kind of user: a stream each, and some hundred calls of the others.
    assert found["coordinator.WatchTasks"]["num_requests"] == 10
    assert {"aggregator.Upload", "audit.AppendEvents", "registry.GetEpoch"} <= set(found)
    assert sum(item["num_failures"] for item in found.values()) == 0, found
    running = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in running if str(tmp_path / "run") in command] == []


def test_bad_figures_are_refused_at_once() -> None:
    for arguments, says in ((["--hospitals", "3"], "at least 15"), (["--params", "many"], "numbers with commas")):
        command = [sys.executable, "-m", "loadtests.load", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert says in done.stderr
