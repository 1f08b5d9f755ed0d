"""`python -m loadtests.chaos`, or `make chaos`."""

import argparse
import sys
from pathlib import Path

from loadtests.chaos.faults import chosen
from loadtests.chaos.faults_network import ALL
from loadtests.chaos.figures import Figures
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
    try:
        chosen((name for name in given.faults.split(",") if name), ALL)
    except KeyError as unknown:
        parser.error(f"no such fault or group: {unknown.args[0]}")
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
        figures = run_chaos(options)
    except FedmeshError as error:
        print(f"make chaos: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_figures(figures)
    return 1 if figures.missed else 0


def print_figures(figures: Figures) -> None:
    """What a person wants to know at once; the report has the rest."""
    print(
        f"{figures.calls:,} calls, {figures.failed} failed ({figures.failed_ratio:.4%}); p50 {figures.p50_ms:.0f} ms, "
        f"p99 {figures.p99_ms:.0f} ms ({figures.p99_all_ms:.0f} ms with outages of stores); {figures.rounds} rounds; "
        f"lost {figures.lost}, doubled {figures.doubled}, not exact {figures.inexact}"
    )
    for fault in figures.faults:
        if fault.skipped:
            print(f"  {fault.name}: SKIPPED, {fault.skipped}")
            continue
        away = "" if fault.outage_s is None else f", no writer for {fault.outage_s:.1f} s"
        print(
            f"  {fault.name}: {fault.count} times, {fault.failed} of {fault.calls:,} calls failed, p99 "
            f"{fault.p99 or 0:.0f} ms, well after {fault.recovered_s:.1f} s{away}"
        )
    for note in figures.notes:
        print(f"  note: {note}")
    for missed in figures.missed:
        print(f"MISSED {missed}")


if __name__ == "__main__":
    sys.exit(main())
