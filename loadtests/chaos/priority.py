"""Who gives way on a machine of few cores: hospitals to the services, everything to what measures."""

from collections.abc import Sequence
from typing import Final

HOSPITAL_NICE: Final = 19
"""Elsewhere a hospital has a machine of its own: here it takes what the services leave."""
MEASURING_NICE: Final = -10
"""A late clock would be a latency of nobody's. Taken by root only; others measure at the usual priority."""


def at_nice(nice: int, argv: Sequence[str]) -> list[str]:
    """A command that runs `argv` at a nice value, in a session of its own.

    Where the kernel shares the processors among sessions first (autogroup, sched(7)), a process's nice value counts
    only within its session, and the session's own decides.
    """
    script = f'{{ echo {nice} > /proc/self/autogroup; }} 2>/dev/null; exec nice -n {nice} "$@"'
    return ["sh", "-c", script, "sh", *argv]
