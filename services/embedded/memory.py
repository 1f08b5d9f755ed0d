"""Memory of a set of processes, shared pages counted once."""

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import psutil


def memory_pss_mb(pids: Iterable[int]) -> float:
    """Proportional set size (proc(5), smaps_rollup) summed over the processes and all their descendants, in MiB.

    PSS divides every shared page by the number of processes that map it, so that the sum counts it once. Processes
    that ended meanwhile count as zero.
    """
    return sum(_pss_kib(pid) for pid in _families(pids)) / 1024


def _families(pids: Iterable[int]) -> set[int]:
    """The processes and all their descendants, from one look at the process table, not one for each of them."""
    children: dict[int, list[int]] = {}
    for pid in psutil.pids():
        # Field 4 of proc(5) stat is the parent; the command name before it may hold spaces and parentheses.
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_bytes()
            children.setdefault(int(stat[stat.rindex(b")") + 2 :].split()[1]), []).append(pid)
    family: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in family:
            family.add(pid)
            waiting += children.get(pid, [])
    return family


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        return 0
    return 0


class PeakMemory:
    """Samples `memory_pss_mb` in a thread while its block runs and at its end; `peak_mb` is the largest sum, in MiB."""

    def __init__(self, pids: Callable[[], Iterable[int]], interval_s: float = 1.0) -> None:
        """pids: says, at every sample, which processes count; descendants are added."""
        self.peak_mb = 0.0
        self._pids = pids
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def sample(self) -> float:
        """Take a sample now; the sum in MiB."""
        now = memory_pss_mb(self._pids())
        self.peak_mb = max(self.peak_mb, now)
        return now

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.sample()
            if self._ended.wait(self._interval_s):
                self.sample()
                return
