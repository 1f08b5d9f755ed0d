"""`python -m loadtests.peers`: install the peers, measure them, write a JSON report.

python -m loadtests.peers --params 2048,100000,1000000 --hospitals 15 --report peers.json
python -m loadtests.peers --peer nvflare
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.status import Status

from loadtests.peers.environments import CACHE, prepare
from loadtests.peers.flower import benchmark as flower
from loadtests.peers.nvflare import benchmark as nvflare
from loadtests.peers.settings import Report, Request, Tell
from loadtests.peers.tables import print_report
from services.common.errors import FedmeshError
from services.secure_sum.cohort import threshold


class Peer(StrEnum):
    """What can be measured."""

    NVFLARE = "nvflare"
    FLOWER = "flower"


MEASURES: Final[dict[Peer, Callable[[Request, Tell], Report]]] = {
    Peer.FLOWER: flower.measure,
    Peer.NVFLARE: nvflare.measure,
}
_INTERRUPTED: Final = 130
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def run(
    params: Annotated[str, typer.Option(help="Vector lengths, separated by commas.")] = "2048,100000,1000000",
    hospitals: Annotated[int, typer.Option(min=4, max=100, help="Clients.")] = 15,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Measurements of each figure.")] = 3,
    peer: Annotated[list[Peer] | None, typer.Option(help="Measure only this one; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=10, help="Give up on a benchmark after this many seconds.")] = 3600,
    report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure the secure sums of other projects on this machine. Medians; a machine that is busy shows in p99."""
    sizes = _sizes(params)
    console, progress = Console(), Console(stderr=True)
    results: Report = {}
    for name in dict.fromkeys(peer or Peer):
        with progress.status(f"{name}: preparing") as status:
            tell = _teller(progress, status)
            home = prepare(name, tell)
            work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
            request = Request(sizes, hospitals, threshold(hospitals), runs, timeout, home, work)
            results[name] = _measure(name, request, tell)
        if report is not None:  # after each: the other one may take an hour, and fail
            report.write_text(json.dumps({"hospitals": hospitals, **results}, indent=2) + "\n")
    print_report(console, results)
    if report is not None:
        console.print(f"written to {report}")


def _measure(peer: Peer, request: Request, tell: Tell) -> Report:
    """Measure, and remove the working folder unless an error names the logs in it."""
    keep = False
    try:
        figures = MEASURES[peer](request, tell)
        keep = bool(figures.get("failure"))
        return figures
    except FedmeshError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(request.work, ignore_errors=True)


def _sizes(params: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in params.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter("give whole numbers above 0, separated by commas", param_hint="--params")
    return sizes


def _teller(console: Console, status: Status) -> Tell:
    def tell(line: str) -> None:
        status.update(line)
        if not console.is_terminal or line.endswith((" s", "CPU", "WRONG")) or "FAILED" in line:
            console.print(line, highlight=False, soft_wrap=True)

    return tell


def _as_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Exit codes: 0 done, 1 an error that is explained, 2 wrong usage, 130 interrupted."""
    # Both by hand: a shell starts background jobs with SIGINT ignored, and then Python would leave it so.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _as_interrupt)
    try:
        app()
    except FedmeshError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # Typer's code for it
            print("interrupted; everything was stopped", file=sys.stderr, flush=True)
        raise


if __name__ == "__main__":
    main()
