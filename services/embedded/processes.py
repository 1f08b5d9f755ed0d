"""Starting, identifying and ending processes without ever touching one that is not ours."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from services.common.errors import Code, FedmeshError
from services.embedded.accounts import Account, folder_error

LOOPBACK: Final = "127.0.0.1"
# How long a process may take to vanish after SIGKILL: one that waits for a disk goes only when the disk answers.
KILL_WAIT_S: Final = 20.0


def start_mark(pid: int) -> str | None:
    """What tells this process from a later one with the same pid; None when there is no such live process.

    On Linux the boot id and the start time in clock ticks (proc(5), field 22), which no clock adjustment moves.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _portable_start_mark(pid)
    fields = stat[stat.rindex(b")") + 2 :].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in (b"Z", b"X") else f"{boot}:{fields[19].decode()}"


def _portable_start_mark(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class ProcessRecord:
    """A process as remembered on disk: its pid counts only together with its start mark."""

    pid: int
    mark: str

    @staticmethod
    def of(pid: int) -> "ProcessRecord | None":
        """The record of a live process; None when there is none."""
        mark = start_mark(pid)
        return None if mark is None else ProcessRecord(pid, mark)

    @staticmethod
    def load(path: Path) -> "ProcessRecord | None":
        """The record in a pid file; None when the file is missing or was cut short by a crash."""
        try:
            raw = json.loads(path.read_text())
            return ProcessRecord(int(raw["pid"]), str(raw["mark"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def save(self, path: Path) -> None:
        """Write the pid file, atomically, readable by its owner only."""
        write_private(path, json.dumps(asdict(self)))

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        return start_mark(self.pid) == self.mark

    def signal(self, signum: int) -> None:
        """Signal the process if it is still the same one."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the process; False when it is still there after `timeout_s` seconds."""
        return wait_until(lambda: not self.alive(), timeout_s)

    def family(self) -> list[int]:
        """Live pids of the process, all its descendants, and whoever is left in the session it led.

        The kernel does not reuse a pid while a session of that number exists. So when the number belongs to a process
        with another mark, the session is another one too, and nothing of this family is left.
        """
        members: set[int] = set()
        if self.alive():
            members.add(self.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                members.update(child.pid for child in psutil.Process(self.pid).children(recursive=True))
        elif (mark := start_mark(self.pid)) is not None and mark != self.mark:
            return []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == self.pid:
                    members.add(pid)
        return sorted(pid for pid in members if start_mark(pid) is not None)


def end_families(
    targets: Sequence[tuple[ProcessRecord, int]], grace_s: float, reap: Callable[[], None] = lambda: None
) -> bool:
    """Ask each process to end with its signal, then SIGKILL what is left of all families after `grace_s` seconds.

    Returns whether nothing is left. The first signal goes to the processes alone: each knows how to end its own
    children. Families are noted before it, because an orphan in a session of its own is found no more. reap: called
    while waiting, to collect children of ours that ended.
    """
    records = [record for record, _ in targets]
    known = [found for record in records for pid in record.family() if (found := ProcessRecord.of(pid)) is not None]
    for record, signum in targets:
        record.signal(signum)

    def ended() -> bool:
        reap()
        return not any(record.alive() for record in records)

    def nothing_left() -> bool:
        reap()
        left = {pid for record in records for pid in record.family()} | {found.pid for found in known if found.alive()}
        kill_all(left)
        return not left

    wait_until(ended, grace_s)
    return wait_until(nothing_left, KILL_WAIT_S)


def kill_all(pids: Iterable[int], signum: int = signal.SIGKILL) -> None:
    """Signal processes that may be gone, or not ours to signal."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.02) -> bool:
    """Poll until the condition holds; False after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval_s)
    return True


def spawn(
    argv: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    account: Account | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that Ctrl-C reaches only us; output is appended to `log` (0600).

    Raises: FedmeshError(CONFIG_INVALID) when the program cannot be started.
    """
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        try:
            return subprocess.Popen(  # noqa: S603 - no shell
                [str(argument) for argument in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=None if env is None else dict(env),
                start_new_session=True,
                pass_fds=pass_fds,
                **(account.popen_arguments() if account else {}),
            )
        except OSError as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot start {argv[0]}: {error.strerror}") from error


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 atomically: readers see the old text or the new.

    Raises: FedmeshError: STORE_FULL on a full disk, CONFIG_INVALID when the folder cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        staging.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise folder_error(path.parent, error) from error


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends, so that Ctrl-C cannot split a step that must be whole.

    Uses handlers and not a blocked mask, because a child would inherit the mask. Only the main thread receives
    signals in Python; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(signum: int, _frame: FrameType | None) -> None:
        held.append(signum)

    previous = {signum: signal.signal(signum, hold) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        if held:
            signal.raise_signal(held[0])


# Until somebody listens on a port that was given out, the system would give it out again.
_GIVEN: Final[deque[int]] = deque(maxlen=4096)


def free_port() -> int:
    """A loopback TCP port that was free a moment ago, and none of those that this process was given shortly before.

    Whoever uses it must still cope with losing it to another process.
    """
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.append(port)
            return port


def require_free_port(port: int, user: str) -> None:
    """Check that a loopback TCP port can be bound.

    Raises: FedmeshError(CONFIG_INVALID) that names the port and what wanted it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise port_error(port, user, str(error.strerror)) from error


def port_error(port: int, user: str, reason: str = "already in use") -> FedmeshError:
    """The error to raise when `user` (such as "PostgreSQL") cannot have its port."""
    return FedmeshError(
        Code.CONFIG_INVALID,
        f"{user} cannot listen on {LOOPBACK}:{port} ({reason}): stop what uses that port or choose another",
        port=port,
    )


def start_error(name: str, log: Path, since: int, port: int | None) -> FedmeshError:
    """Why a process ended while starting, told from what it wrote to its log after byte `since`."""
    text = log_since(log, since)
    lowered = text.lower()
    if "no space left on device" in lowered or "disk quota exceeded" in lowered:
        return FedmeshError(
            Code.STORE_FULL, f"{name} could not start: the disk is full; free some space or move the data folder"
        )
    if port is not None and "address already in use" in lowered:
        return port_error(port, name)
    if "permission denied" in lowered or "invalid permissions" in lowered or "wrong ownership" in lowered:
        return FedmeshError(
            Code.CONFIG_INVALID,
            f"{name} may not use its data folder: give it back to the user who made it; see {log}",
        )
    last = [line for line in text.splitlines() if line.strip()][-3:]
    return FedmeshError(Code.STORE_UNAVAILABLE, f"{name} did not start; see {log}: {' | '.join(last) or 'empty log'}")


def log_since(log: Path, since: int) -> str:
    """What a log file gained after byte `since`, at most the last 64 KiB."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - 65536))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
