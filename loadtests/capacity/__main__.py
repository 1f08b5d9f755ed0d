"""`python -m loadtests.capacity`: machines, bytes and money for a year, from reports of `fedmesh bench secure-sum` and
`make loadtest`.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from loadtests.capacity.model import Assumed, Waiting, Year, round_at
from loadtests.capacity.text import text
from services.common.errors import Code, FedmeshError

MEASURED: Final = Path(__file__).parent / "measured"
ROUNDS: Final = (MEASURED / "rounds-2048.json", MEASURED / "rounds-100000.json")
LOAD: Final = MEASURED / "load.json"


def year(assumed: Assumed, rounds: tuple[Path, ...] = ROUNDS, load: Path = LOAD) -> Year:
    """The model over report files.

    Raises: FedmeshError(INVALID_ARGUMENT) for files that are no such reports, or that do not fit together.
    """
    try:
        reports = sorted((_read(path) for path in rounds), key=lambda report: int(report["params"]))
        costs = _read(load)["costs"]
        waiting = Waiting(costs["stream_cores"], costs["stream_mib"])
        return Year(assumed, round_at(reports, assumed.params), waiting)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"not the reports that are needed: {error!r}") from error


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.capacity", description=__doc__)
    sums = "reports of fedmesh bench secure-sum"
    parser.add_argument("--round-reports", type=Path, nargs="+", default=ROUNDS, help=sums)
    parser.add_argument("--load-report", type=Path, default=LOAD, help="report of make loadtest")
    for item in fields(Assumed):
        name = f"--{item.name.replace('_', '-')}"
        parser.add_argument(name, type=type(item.default), default=item.default, help="(%(default)s)")
    given = parser.parse_args()
    assumed = Assumed(**{item.name: getattr(given, item.name) for item in fields(Assumed)})
    if min(vars(assumed).values()) <= 0 or assumed.filled > 1:
        parser.error("all figures are more than 0, and --filled is at most 1")
    try:
        print(text(year(assumed, tuple(given.round_reports), given.load_report)))
    except FedmeshError as error:
        print(f"capacity: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
