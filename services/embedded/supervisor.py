"""Child processes of a stack: started in sessions of their own, watched, and ended without leaving anything behind.

With a guard, the children end with this process, whatever ends it; without one they outlive it, and any later process
finds them again by their pid files. Ctrl-C goes to the foreground process group, in which no child is: the order of
ending is always ours.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from services.common.errors import Code, FedmeshError
from services.common.ids import require_name
from services.embedded import accounts, processes
from services.embedded.guard import Guard
from services.embedded.processes import ProcessRecord


@dataclass(frozen=True)
class ChildSpec:
    """What to start. `name` is a file name too: an RFC 1123 label.

    env: added to our environment. ready: says whether the child serves; None means as soon as it runs. grace_s: seconds
    between SIGTERM and SIGKILL. rank: higher ranks are ended first (services 1, hospitals 2).
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready: Callable[[], bool] | None = None
    grace_s: float = 10.0
    rank: int = 1


@dataclass(frozen=True)
class ChildStatus:
    """A child as seen now. `exit_code` is known only to the process that started it; negative is a signal's number."""

    name: str
    pid: int
    running: bool
    exit_code: int | None
    log: Path


@dataclass(frozen=True)
class _Child:
    name: str
    record: ProcessRecord
    grace_s: float
    rank: int


class Supervisor:
    """The children whose pid files and logs are in `run_dir`, whoever started them."""

    def __init__(self, run_dir: Path, *, guard: Guard | None = None) -> None:
        """run_dir: made when missing; holds `<name>.json` (pid file) and `<name>.log`. guard: see the module."""
        self.run_dir = run_dir.absolute()
        self._guard = guard
        self._popen: dict[str, subprocess.Popen[bytes]] = {}
        self._ready: dict[str, Callable[[], bool]] = {}

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    # ---- starting

    def start(self, spec: ChildSpec) -> int:
        """Start a child and return its pid, without waiting for it to be ready.

        Raises: FedmeshError: WRONG_STATE when a child of that name runs, CONFIG_INVALID when it cannot be started,
        STORE_FULL when there is no room for its log.
        """
        require_name(spec.name, "process name")
        accounts.private_folder(self.run_dir)
        known = self._load(spec.name)
        if known is not None and known.record.alive():
            raise FedmeshError(Code.WRONG_STATE, f"{spec.name} runs already (pid {known.record.pid}): stop it first")
        environment = {**os.environ, **spec.env, **(self._guard.environment() if self._guard else {})}
        with processes.deferred_interrupts():
            try:
                popen = processes.spawn(spec.argv, self.log(spec.name), cwd=spec.cwd, env=environment)
                self._remember(spec, popen)
            except OSError as error:
                raise accounts.folder_error(self.run_dir, error) from error
        return popen.pid

    def wait_ready(self, names: Iterable[str], timeout_s: float = 60.0) -> None:
        """Wait until all the named children are ready.

        Raises: FedmeshError(SERVICE_UNAVAILABLE) when one ends or is not ready after `timeout_s` seconds; it quotes the
        end of the child's log.
        """
        waiting = list(names)

        def all_ready() -> bool:
            for name in list(waiting):
                popen = self._popen[name]
                if popen.poll() is not None:
                    raise self._failure(name, f"ended with {describe_exit(popen.returncode)}")
                if self._ready.get(name, lambda: True)():
                    waiting.remove(name)
            return not waiting

        if not processes.wait_until(all_ready, timeout_s, interval_s=0.05):
            raise self._failure(waiting[0], f"was not ready in {timeout_s:g} s")

    # ---- watching

    def status(self) -> list[ChildStatus]:
        """Every child with a pid file, by name; one that was stopped in good order has none."""
        return [self._status_of(child) for child in self._children()]

    def ended(self) -> list[ChildStatus]:
        """The children that ended without being asked to."""
        return [status for status in self.status() if not status.running]

    def pids(self) -> list[int]:
        """The pids of the running children, without their descendants."""
        return [status.pid for status in self.status() if status.running]

    def log(self, name: str) -> Path:
        """The file that receives a child's output (mode 0600)."""
        return self.run_dir / f"{name}.log"

    # ---- ending

    def stop(self, name: str) -> None:
        """End one child and all its descendants: SIGTERM, then SIGKILL after its grace. Idempotent."""
        child = self._load(name)
        if child is not None:
            with processes.deferred_interrupts():
                self._end([child])

    def kill(self, name: str) -> None:
        """End one child as a crash would: SIGKILL to it and its descendants; its pid file stays, see `ended`."""
        child = self._load(name)
        if child is not None:
            processes.end_families([(child.record, signal.SIGKILL)], 5.0, self._reap)

    def stop_all(self) -> None:
        """End all children, higher ranks first, those of one rank together. Ctrl-C waits until it is done."""
        with processes.deferred_interrupts():
            children = self._children()
            for rank in sorted({child.rank for child in children}, reverse=True):
                self._end([child for child in children if child.rank == rank])

    def _end(self, children: list[_Child]) -> None:
        grace_s = max(child.grace_s for child in children)
        processes.end_families([(child.record, signal.SIGTERM) for child in children], grace_s, self._reap)
        for child in children:
            self._pid_file(child.name).unlink(missing_ok=True)
            self._popen.pop(child.name, None)
            self._ready.pop(child.name, None)

    # ---- memory and files

    def _remember(self, spec: ChildSpec, popen: subprocess.Popen[bytes]) -> None:
        self._popen[spec.name] = popen
        if spec.ready is not None:
            self._ready[spec.name] = spec.ready
        # A child that is gone already has left a zombie of ours: its pid is not another's, an empty mark never matches.
        record = ProcessRecord.of(popen.pid) or ProcessRecord(popen.pid, "")
        if self._guard is not None:
            self._guard.add(record, grace_s=spec.grace_s, rank=spec.rank)
        content = {"pid": record.pid, "mark": record.mark, "grace_s": spec.grace_s, "rank": spec.rank}
        processes.write_private(self._pid_file(spec.name), json.dumps(content))

    def _children(self) -> list[_Child]:
        loaded = [self._load(path.stem) for path in sorted(self.run_dir.glob("*.json"))]
        return [child for child in loaded if child is not None]

    def _load(self, name: str) -> _Child | None:
        try:
            raw = json.loads(self._pid_file(name).read_text())
            record = ProcessRecord(int(raw["pid"]), str(raw["mark"]))
            return _Child(name, record, float(raw["grace_s"]), int(raw["rank"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _status_of(self, child: _Child) -> ChildStatus:
        popen = self._popen.get(child.name)
        code = None if popen is None else popen.poll()
        return ChildStatus(child.name, child.record.pid, child.record.alive(), code, self.log(child.name))

    def _reap(self) -> None:
        for popen in self._popen.values():
            popen.poll()

    def _pid_file(self, name: str) -> Path:
        return self.run_dir / f"{name}.json"

    def _failure(self, name: str, what: str) -> FedmeshError:
        tail = [line for line in processes.log_since(self.log(name), 0).splitlines() if line.strip()][-3:]
        said = f": {' | '.join(tail)}" if tail else ""
        return FedmeshError(Code.SERVICE_UNAVAILABLE, f"{name} {what}; see {self.log(name)}{said}", process=name)


def describe_exit(code: int) -> str:
    """An exit code as `subprocess` gives it, in words: "exit code 78" or "SIGKILL"."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
