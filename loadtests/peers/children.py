"""The processes of a peer: started together, bounded, all ended at the end, however it ends."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from types import TracebackType
from typing import Final, Self

from services.common.errors import Code, FedmeshError
from services.embedded.guard import Guard
from services.embedded.processes import ProcessRecord, deferred_interrupts, end_families, log_since, spawn

GRACE_S: Final = 5.0
# Of our own environment a peer gets only what a program needs to run at all: no PYTHONPATH, no foreign settings.
# PYTHONDONTWRITEBYTECODE is among what is left out: it would have a peer compile its sources at each start.
_INHERITED: Final = ("HOME", "LANG", "LC_ALL", "TMPDIR", "USER")


def environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The process environment for programs of the virtual environment `home`."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = f"{home / 'bin'}:{os.environ.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(home), "PYTHONUNBUFFERED": "1", **extra}


class Children:
    """A context: what `start` started, and all its descendants, is gone when the block is left.

    A watcher process does the same if we are killed outright.
    """

    def __init__(self, logs: Path, env: Mapping[str, str], timeout_s: float) -> None:
        self._logs = logs
        self._env = dict(env)
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._started: dict[str, Popen[bytes]] = {}
        self._records: list[ProcessRecord] = []
        self._guard: Guard | None = None

    def __enter__(self) -> Self:
        self._guard = Guard()
        self._env |= self._guard.environment()
        return self

    def start(self, name: str, argv: Sequence[str | Path], cwd: Path | None = None) -> Path:
        """Start a program; returns the log that its output goes to."""
        assert self._guard is not None
        log = self._logs / f"{name}.log"
        with deferred_interrupts():
            process = spawn(argv, log, cwd=cwd, env=self._env)
            self._started[name] = process
            if (record := ProcessRecord.of(process.pid)) is not None:
                self._records.append(record)
                self._guard.add(record, grace_s=GRACE_S)
        return log

    def finished(self, name: str) -> bool:
        """Whether a program that should end by itself has ended well.

        Raises:
            FedmeshError: SERVICE_UNAVAILABLE with the end of its log if it failed.
        """
        code = self._started[name].poll()
        if code is None:
            return False
        if code != 0:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"{name} ended with code {code}: {self._tail(name)}")
        return True

    def check(self) -> None:
        """Nobody has failed and the time is not over.

        Raises:
            FedmeshError: SERVICE_UNAVAILABLE naming the program that failed; DEADLINE_EXCEEDED when time is over.
        """
        for name in self._started:
            self.finished(name)
        if time.monotonic() > self._deadline:
            raise FedmeshError(
                Code.DEADLINE_EXCEEDED,
                f"not done after {self._timeout_s:.0f} s; raise --timeout or measure less (--params, --runs); "
                f"logs: {self._logs}",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None
        end_families([(record, signal.SIGTERM) for record in self._records], GRACE_S, self._reap)
        self._reap()
        self._guard.close()

    def _reap(self) -> None:
        for process in self._started.values():
            process.poll()

    def _tail(self, name: str) -> str:
        log = self._logs / f"{name}.log"
        lines = [line.strip() for line in log_since(log, 0).splitlines() if line.strip()]
        return f"{' | '.join(lines[-4:]) or 'empty log'} (log: {log})"
