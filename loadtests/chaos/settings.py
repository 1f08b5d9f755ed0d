"""What a run is, and what is asked of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

FULL_CALLS: Final = 100_000
FULL_REPEATS: Final = 3


@dataclass(frozen=True)
class Options:
    """calls: the least number of calls. repeats: how often each fault comes. faults: names or groups; empty means all.

    rate: calls a second. hospitals: nodes that run rounds. clients: further hospitals that wait on task streams and
    make calls. quiet_s: before the first fault. folder: emptied first; holds logs and the ledger of truth afterwards.
    """

    folder: Path
    calls: int = FULL_CALLS
    repeats: int = FULL_REPEATS
    faults: tuple[str, ...] = ()
    rate: float = 40.0
    hospitals: int = 15
    clients: int = 135
    quiet_s: float = 180.0
    report: Path | None = None

    @property
    def full(self) -> bool:
        """Whether all of it is run: only such a run is held against every target."""
        return self.calls >= FULL_CALLS and self.repeats >= FULL_REPEATS and not self.faults


@dataclass(frozen=True)
class Targets:
    """Limits of a run. Shares are parts of one, times in seconds or as named."""

    failed_ratio: float = 0.0001
    p99_ms: float = 500.0
    p99_quiet_ms: float = 50.0
    postgres_kill_s: float = 3.0
    postgres_other_s: float = 30.0
    redis_s: float = 4.0
    rounds_resume_s: float = 10.0
    calls: int = FULL_CALLS
    fault_share: float = 0.2
    repeats: int = FULL_REPEATS
