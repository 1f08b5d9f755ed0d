"""`python -m loadtests.load`, or `make loadtest`: how calls, uploads, the log and idle hospitals load a stack."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from loadtests.load.figures import costs, missed, table
from loadtests.load.run import run_load, stamp
from loadtests.load.settings import FAILED_RATIO, GROWTH, MEMBERS, Options
from loadtests.peers.environments import ROOT, prepare
from services.common.errors import FedmeshError

FOLDER = ROOT / ".cache" / "loadtest"


def main() -> int:
    options = _options()
    try:
        home = prepare("locust", _tell, Path(__file__).with_name("requirements.txt"))
        scenarios = run_load(options, home / "bin" / "python", _tell)
    except FedmeshError as error:
        print(f"make loadtest: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    over = missed(scenarios, options)
    print(table(scenarios))
    for line in over:
        print(f"MISSED {line}")
    if options.report is not None:
        document = {
            "at": stamp(),
            "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "cpu": platform.machine()},
            "limits": {"p99_ms": options.p99_ms, "failed_ratio": FAILED_RATIO, "growth": GROWTH},
            "costs": asdict(costs(scenarios)),
            "scenarios": [item.document() for item in scenarios],
            "missed": over,
        }
        options.report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if over else 0


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="make loadtest", description=__doc__)
    steps = ",".join(map(str, Options.hospitals))
    parser.add_argument("--hospitals", default=steps, help="on the task stream, step by step (%(default)s)")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of each scenario (%(default)s)")
    parser.add_argument("--rate", type=float, default=Options.rate, help="control-plane calls a second (%(default)s)")
    parser.add_argument("--uploads", type=float, default=Options.uploads, help="uploads a second (%(default)s)")
    parser.add_argument("--events", type=float, default=Options.events, help="audit calls a second (%(default)s)")
    sizes = ",".join(map(str, Options.params))
    parser.add_argument("--params", default=sizes, help="integers in an upload, by model (%(default)s)")
    parser.add_argument("--p99-ms", type=float, default=Options.p99_ms, help="limit of each scenario (%(default)s)")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="emptied first; the stack's folder")
    parser.add_argument("--report", type=Path, default=None, help="write the figures to this JSON file")
    given = parser.parse_args()
    try:
        hospitals = tuple(int(item) for item in given.hospitals.split(","))
        params = tuple(int(item) for item in given.params.split(","))
    except ValueError:
        parser.error("--hospitals, --params: numbers with commas between them")
    if min(hospitals) < MEMBERS:
        parser.error(f"--hospitals: at least {MEMBERS}, who found the consortium")
    if min(given.seconds, given.rate, given.uploads, given.events, *params, given.p99_ms) <= 0:
        parser.error("rates, seconds, sizes and limits are more than 0")
    return Options(
        folder=given.dir,
        report=given.report,
        hospitals=hospitals,
        seconds=given.seconds,
        rate=given.rate,
        uploads=given.uploads,
        events=given.events,
        params=params,
        p99_ms=given.p99_ms,
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
