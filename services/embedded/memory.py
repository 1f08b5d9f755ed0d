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
    family: set[int] = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update({pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))})
    return sum(_pss_kib(pid) for pid in family) / 1024


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        return 0
    return 0


class PeakMemory:
    """Samples `memory_pss_mb` in a thread while its block runs; `peak_mb` is the largest sum seen, in MiB."""

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
                return
