"""Orphans of a program that runs under the reaper vanish as they end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from loadtests.chaos import reaper
from services.embedded.processes import wait_until

# Leaves a grandchild behind that waits for the end of its standard input, tells its pid, and waits itself.
_PROGRAM = """
import os, sys
if os.fork() == 0:
    if os.fork() == 0:
        os.write(1, f"{os.getpid()}\\n".encode())
        os.read(0, 1)
    os._exit(0)
os.wait()
import signal
signal.pause()
"""


def started(program: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-I", str(reaper.__file__), sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_an_orphan_is_collected_at_once_and_signals_reach_the_program() -> None:
    with started(_PROGRAM) as running:
        assert running.stdout is not None
        assert running.stdin is not None
        orphan = int(running.stdout.readline())
        status = Path(f"/proc/{orphan}/status")
        try:
            # Adopted once the process between them has ended.
            assert wait_until(lambda: f"PPid:\t{running.pid}" in status.read_text().splitlines(), 20)
            os.kill(orphan, signal.SIGKILL)
            assert wait_until(lambda: not status.exists(), 20)
            assert running.poll() is None
        finally:
            running.terminate()
        assert running.wait(20) == 128 + signal.SIGTERM


def test_the_exit_code_is_the_programs() -> None:
    with started("raise SystemExit(3)") as running:
        assert running.wait(20) == 3
