"""Runs a program and collects its orphans at once, as an init does: `python reaper.py PROGRAM ARGUMENT ...`.

A PostgreSQL that Patroni started is an orphan by design. Killed, it stays a zombie until whoever adopted it collects
it, and so long Patroni takes it for alive. An init does that at once; the first process of a bare container or sandbox
may take seconds. So this process adopts the orphans below it (PR_SET_CHILD_SUBREAPER, prctl(2)).
"""

import contextlib
import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Final

PR_SET_CHILD_SUBREAPER: Final = 36
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str]) -> int:
    """Run until the program itself ends; returns its exit code, 128 and more for a signal. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    child = os.spawnvp(os.P_NOWAIT, argv[0], argv)  # noqa: S606 - no shell

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
