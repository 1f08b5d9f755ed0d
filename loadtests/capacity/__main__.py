"""`python -m loadtests.capacity`: machines, bytes and money for a year, from reports of `fedmesh bench secure-sum` and
`make loadtest`. `python -m loadtests.capacity.measure`, or `make capacity`, makes those reports anew.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from loadtests.capacity.model import Assumed
from loadtests.capacity.reports import MEASURED, Reports
from loadtests.capacity.text import DOCUMENT, text, write
from services.common.errors import FedmeshError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.capacity", description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder with the reports (%(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write it into {DOCUMENT.name} instead of printing it")
    for item in fields(Assumed):
        name = f"--{item.name.replace('_', '-')}"
        parser.add_argument(name, type=type(item.default), default=item.default, help="(%(default)s)")
    given = parser.parse_args()
    assumed = Assumed(**{item.name: getattr(given, item.name) for item in fields(Assumed)})
    if min(vars(assumed).values()) <= 0 or assumed.filled > 1:
        parser.error("all figures are more than 0, and --filled is at most 1")
    try:
        found = text(Reports.read(given.measured), assumed)
    except FedmeshError as error:
        print(f"capacity: {error.message}", file=sys.stderr)
        return 1
    if given.write:
        write(found)
    else:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
