"""Where the `fedmesh` command begins. Small, so that Ctrl-C is answered well even while the rest is being loaded."""

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130


def _as_interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command. Exit codes: 0 done, 1 an error that is explained, 2 wrong usage, 130 interrupted."""
    # A supervisor's SIGTERM ends a run as cleanly as Ctrl-C does. SIGINT is taken too, because a shell's background job
    # starts with it ignored: whoever then sends it would be left with a run that cannot be interrupted.
    signal.signal(signal.SIGTERM, _as_interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The command says by itself what is wrong; gRPC's own log lines would be printed between its lines. Read by gRPC
    # when it is imported. A service's lines go to its log file.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        _run()
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer turns an interrupt within a command into exit code 130.
        if isinstance(ended, SystemExit) and ended.code != _INTERRUPTED:
            raise
        print("interrupted; everything was stopped", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # What was started is stopped by now; half-loaded libraries must not have a last word.
        os._exit(_INTERRUPTED)


def _run() -> None:
    from rich.console import Console
    from rich.markup import escape

    from services.cli.main import app
    from services.common.errors import FedmeshError

    try:
        app()
    except FedmeshError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
