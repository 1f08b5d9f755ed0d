"""A watcher that ends our processes when we are gone, however we went, kill -9 included.

The watcher holds the reading end of a pipe whose writing end only the guarded process has: the pipe's end of file is
that process's death, whatever its cause. A parent-death signal (prctl(2)) would reach direct children only, fires when
the *thread* that started the child ends, and is lost when the child changes its uid; a hospital node has grandchildren
of its own and PostgreSQL changes its uid. Two nets catch what was started in the last instant, before it could be
announced on the pipe: a marker in the environment, inherited by everything, and the sessions of announced processes.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from services.embedded.processes import (
    KILL_WAIT_S,
    ProcessRecord,
    deferred_interrupts,
    end_families,
    kill_all,
    start_mark,
    wait_until,
)

MARKER: Final = "FEDMESH_GUARD"
PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]


class Guard:
    """Ends everything registered with it once this process ends. One per process is enough.

    Lower ranks end later: stores have rank 0, services 1, hospitals 2, so that nobody loses a store in mid-write.
    """

    def __init__(self) -> None:
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()
        reading, self._pipe = os.pipe()
        environment = {key: value for key, value in os.environ.items() if key != MARKER}
        environment["PYTHONPATH"] = str(PACKAGE_ROOT)
        with deferred_interrupts():
            self._watcher = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", "services.embedded.guard", str(reading), self._token, str(os.getpid())],
                pass_fds=[reading],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
                cwd="/",
            )
        os.close(reading)

    @property
    def pid(self) -> int:
        """The watcher's pid, to be left out of whatever lists our children."""
        return self._watcher.pid

    def environment(self) -> dict[str, str]:
        """What to add to the environment of a child that is to end with us."""
        return {MARKER: self._token}

    def add(self, record: ProcessRecord, *, signum: int = signal.SIGTERM, grace_s: float = 5.0, rank: int = 1) -> None:
        """Have the process and its descendants ended when we are: `signum`, then SIGKILL after `grace_s` seconds."""
        self._tell(_Announcement(record.pid, record.mark, int(signum), grace_s, rank))

    def close(self) -> None:
        """End the guard, and with it whatever is still registered and running."""
        with self._lock:
            if self._pipe >= 0:
                os.close(self._pipe)
                self._pipe = -1
        self._watcher.wait()

    def _tell(self, message: "_Announcement") -> None:
        with self._lock:
            os.write(self._pipe, json.dumps(asdict(message)).encode() + b"\n")  # under PIPE_BUF: written whole


@dataclass(frozen=True)
class _Announcement:
    pid: int
    mark: str
    signum: int
    grace_s: float
    rank: int


def _read_until_parent_is_gone(pipe: int, parent: int) -> list[dict[str, Any]]:
    """Collect announcements until end of file, or until our parent is another process (a fork may hold the pipe)."""
    data = b""
    while True:
        readable, _, _ = select.select([pipe], [], [], 1.0)
        if readable:
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            data += chunk
        elif os.getppid() != parent:
            break
    messages = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            messages.append(json.loads(line))
    return messages


def _marked(token: str) -> list[int]:
    """Live pids whose environment carries the marker, this process excluded."""
    found = []
    wanted = f"{MARKER}={token}".encode()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return [pid for pid in found if start_mark(pid) is not None]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return pid


def _watch(pipe: int, token: str, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    targets: dict[int, list[tuple[ProcessRecord, int]]] = {}
    grace_s: dict[int, float] = {}
    announced = set()
    for raw in _read_until_parent_is_gone(pipe, parent):
        entry = _Announcement(**raw)
        announced.add(entry.pid)
        targets.setdefault(entry.rank, []).append((ProcessRecord(entry.pid, entry.mark), entry.signum))
        grace_s[entry.rank] = max(entry.grace_s, grace_s.get(entry.rank, 0.0))
    kill_all((pid for pid in _marked(token) if not announced & {pid, _session(pid)}), signal.SIGTERM)
    for rank in sorted(targets, reverse=True):
        end_families(targets[rank], grace_s[rank])

    def nothing_left() -> bool:
        leftover = _marked(token)
        kill_all(leftover)
        return not leftover

    wait_until(nothing_left, KILL_WAIT_S)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
