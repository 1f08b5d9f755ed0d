"""`python -m loadtests.capacity.measure`, or `make capacity`: measure what the model starts from and write its tables.

Processor time is what the model needs of a measurement, so a machine need not be idle; how much of it others used just
before and after is noted beside each report.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import psutil

from loadtests.capacity.model import Assumed
from loadtests.capacity.reports import LOAD, MACHINE, MEASURED, Reports
from loadtests.capacity.text import text, write

# Rounds by integers of the model: enough that a hundredth of a second, in which the kernel counts, does not matter.
ROUNDS: Final = {2048: 20, 100_000: 10, 1_000_000: 5}
LOOK_S: Final = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make capacity", description=__doc__)
    parser.add_argument("--only", choices=("rounds", "load"), help="measure this part anew and keep the other")
    given = parser.parse_args()
    missed = False
    if given.only != "load":
        fedmesh = Path(sys.executable).with_name("fedmesh")
        for params, rounds in ROUNDS.items():
            command = [str(fedmesh), "bench", "secure-sum", "--params", str(params), "--rounds", str(rounds)]
            missed |= not measured(f"rounds-{params}", command)
    if given.only != "rounds":
        missed |= not measured(LOAD, [sys.executable, "-m", "loadtests.load"])
    write(text(Reports.read(MEASURED), Assumed()))
    return int(missed)


def measured(name: str, command: list[str]) -> bool:
    """Make a report, and note on what machine. False: it says itself what it missed."""
    before = _others()
    done = subprocess.run([*command, "--report", str(MEASURED / f"{name}.json")], check=False)  # noqa: S603 - our own
    path = MEASURED / f"{MACHINE}.json"
    machine: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine[name] = {
        "at": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "cpu": platform.machine(),
        "others_cores": round((before + _others()) / 2, 2),
    }
    path.write_text(json.dumps(machine, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return done.returncode == 0


def _others() -> float:
    """Processors that are busy while nothing of ours runs."""
    return psutil.cpu_percent(interval=LOOK_S) / 100 * (os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
