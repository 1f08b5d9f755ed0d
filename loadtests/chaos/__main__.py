"""`python -m loadtests.chaos`, or `make chaos`."""

import argparse
import sys
from pathlib import Path

from loadtests.chaos.programs import ROOT
from loadtests.chaos.run import run_chaos
from loadtests.chaos.settings import Options
from services.common.errors import FedmeshError

FOLDER = ROOT / ".cache" / "chaos" / "run"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--calls", type=int, default=Options.calls, help="least number of calls (%(default)s)")
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="times each fault comes (%(default)s)")
    parser.add_argument("--faults", default="", help="names or groups, with commas between them; all by default")
    parser.add_argument("--rate", type=float, default=Options.rate, help="calls a second (%(default)s)")
    parser.add_argument("--hospitals", type=int, default=Options.hospitals, help="nodes that run rounds (%(default)s)")
    parser.add_argument("--clients", type=int, default=Options.clients, help="further hospitals (%(default)s)")
    parser.add_argument("--quiet", type=float, default=Options.quiet_s, help="seconds before the first fault")
    parser.add_argument("--dir", type=Path, default=FOLDER, help="emptied first; holds logs and what was acknowledged")
    parser.add_argument("--report", type=Path, default=None, help="write figures to this JSON file, and HTML beside it")
    given = parser.parse_args()
    options = Options(
        folder=given.dir,
        calls=given.calls,
        repeats=given.repeats,
        faults=tuple(name for name in given.faults.split(",") if name),
        rate=given.rate,
        hospitals=given.hospitals,
        clients=given.clients,
        quiet_s=given.quiet,
        report=given.report,
    )
    try:
        run_chaos(options)
    except FedmeshError as error:
        print(f"make chaos: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
