"""What the embedded PostgreSQL and Redis have in common: folders, identity on disk, passwords, stopping."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.guard import Guard
from services.embedded.processes import LOOPBACK, ProcessRecord


@dataclass(frozen=True)
class StoreStatus:
    """What is known of an embedded store. `port` None: it listens on its Unix socket in `socket_dir` only."""

    running: bool
    pid: int | None
    version: str
    socket_dir: Path | None
    port: int | None
    log: Path


class StoreProcess:
    """A store server in `data_dir`, its data kept between starts. Subclasses say how it is started.

    Files in `data_dir`: a folder of the server's own (`server_folder`, its working directory), `run/` (the socket,
    where the path is short enough), `secrets/` (one password file a user), a log, `state.json`.
    """

    name: ClassVar[str]
    server_folder: ClassVar[str]
    stop_signal: ClassVar[int]
    # The server's own pid file in its working directory, for servers whose start we did not live to record.
    pid_file: ClassVar[str]

    def __init__(self, data_dir: Path, port: int | None, guard: Guard | None) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.log = self.data_dir / f"{self.name.lower()}.log"
        self._guard = guard
        self._account = accounts.store_account()
        self._child: subprocess.Popen[bytes] | None = None
        self._home = self.data_dir / self.server_folder
        self._secrets = self.data_dir / "secrets"
        self._state_file = self.data_dir / "state.json"

    # ---- life cycle

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the server and wait until it serves, making whatever is missing. Does nothing when it runs.

        Raises: FedmeshError: CONFIG_INVALID (port taken, folder or programs unusable, no TLS in the build, data of
        another major version), STORE_FULL, STORE_UNAVAILABLE (did not start, or not within `timeout_s` seconds).
        """
        if self._running_record() is not None:
            return
        if self.port is not None:
            processes.require_free_port(self.port, self.name)
        try:
            self._prepare_folders()
            self._start(timeout_s)
        except BaseException as error:  # Ctrl-C too: a start that raises leaves nothing running
            self.stop()
            self._remove_outside_sockets()
            if isinstance(error, OSError):
                raise accounts.folder_error(self.data_dir, error) from error
            raise

    def _start(self, timeout_s: float) -> None:
        """Start a server that does not run, in folders that exist, and wait until it serves."""
        raise NotImplementedError

    def stop(self, timeout_s: float = 20.0) -> None:
        """Stop the server in good order, or by force after `timeout_s` seconds. Does nothing when stopped.

        Works from any process, not only from the one that started the server; nothing acknowledged is lost.
        """
        record = self._running_record()
        if record is not None:
            self._end(record, self.stop_signal, timeout_s)

    def kill(self) -> None:
        """End the server as a crash would: SIGKILL. The next start recovers from its log."""
        record = self._running_record()
        if record is not None:
            self._end(record, signal.SIGKILL, 10.0)

    def status(self) -> StoreStatus:
        """Whether the server runs, and where it listens; reads files and the process table only."""
        record = self._running_record()
        state = self._state()
        folder = state.get("socket_dir")
        return StoreStatus(
            running=record is not None,
            pid=None if record is None else record.pid,
            version=str(state.get("version", "")),
            socket_dir=None if folder is None else Path(str(folder)),
            port=self.port,
            log=self.log,
        )

    def destroy(self) -> None:
        """Stop the server and delete its data folder and its socket folder."""
        self.stop()
        self._remove_outside_sockets()
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def password_file(self, user: str) -> Path:
        """The file (mode 0600) that holds a user's password and nothing else."""
        return self._secrets / f"{user}.password"

    def password(self, user: str) -> str:
        """The password of a user."""
        return self.password_file(user).read_text().strip()

    @property
    def socket_dir(self) -> Path:
        """The folder of the Unix socket.

        Raises: FedmeshError(STORE_UNAVAILABLE) when the server was never started.
        """
        folder = self._state().get("socket_dir")
        if folder is None:
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"the {self.name} in {self.data_dir} was never started")
        return Path(str(folder))

    # ---- for subclasses

    def _prepare_folders(self) -> None:
        for folder in (self.data_dir, self._secrets):
            accounts.private_folder(folder)
        if self._account.drop:
            self.data_dir.chmod(0o711)
        accounts.private_folder(self._home, self._account)

    def _ensure_password(self, user: str) -> bool:
        """Make a random password (256 bits) unless there is one; says whether it is new."""
        if self.password_file(user).exists():
            return False
        processes.write_private(self.password_file(user), secrets.token_urlsafe(32) + "\n")
        return True

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", **(self._guard.environment() if self._guard else {})}

    def _spawn_server(
        self, argv: Sequence[str | Path], *, cwd: Path, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        with processes.deferred_interrupts():
            child = processes.spawn(
                argv,
                self.log,
                cwd=cwd,
                env=self._environment(),
                account=self._account,
                pass_fds=pass_fds,
            )
            self._child = child
            record = ProcessRecord.of(child.pid)
            if record is not None:
                self._save_state(pid=record.pid, mark=record.mark)
                if self._guard is not None:
                    self._guard.add(record, signum=self.stop_signal, grace_s=10.0, rank=0)
        return child

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _socket_folder(self, socket_name: str) -> Path:
        remembered = self._state().get("socket_dir")
        folder = accounts.socket_folder(
            self.data_dir / "run", None if remembered is None else Path(str(remembered)), socket_name, self._account
        )
        if str(folder) != remembered:
            self._save_state(socket_dir=str(folder))
        return folder

    def _remove_outside_sockets(self) -> None:
        """Leave no socket folder in the system's temporary folder; the next start makes the same one again."""
        folder = self._state().get("socket_dir")
        if folder is not None and not Path(str(folder)).is_relative_to(self.data_dir):
            shutil.rmtree(str(folder), ignore_errors=True)

    def _tcp_port(self) -> int:
        if self.port is None:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"this {self.name} listens on its Unix socket only, not on {LOOPBACK}: give it a port",
            )
        return self.port

    # ---- what runs

    def _own_pid_lines(self) -> list[str]:
        try:
            return (self._home / self.pid_file).read_text().splitlines()
        except OSError:
            return []

    def _running_record(self) -> ProcessRecord | None:
        """The live server on this data, whoever started it.

        Believed when it is the process that we recorded, or when the process named in the server's own pid file works
        in this very folder, as a server always does: the number alone may be another program's by now.
        """
        state = self._state()
        if "pid" in state:
            recorded = ProcessRecord(int(str(state["pid"])), str(state["mark"]))
            if recorded.alive():
                return recorded
        lines = self._own_pid_lines()
        if lines and lines[0].strip().isdigit():
            pid = int(lines[0])
            with contextlib.suppress(psutil.Error):
                if Path(psutil.Process(pid).cwd()) == self._home.resolve():
                    return ProcessRecord.of(pid)
        return None

    def _end(self, record: ProcessRecord, signum: int, timeout_s: float) -> None:
        """Signal the server, wait until it is gone, and see to it that its children are too."""
        with processes.deferred_interrupts():
            processes.end_families([(record, signum)], timeout_s, self._reap)
            self._remove_outside_sockets()

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None

    # ---- state

    def _state(self) -> dict[str, object]:
        try:
            loaded = json.loads(self._state_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise accounts.folder_error(self.data_dir, error) from error
        return loaded if isinstance(loaded, dict) else {}

    def _save_state(self, **changes: object) -> None:
        processes.write_private(self._state_file, json.dumps({**self._state(), **changes}))


def remove_tree(folder: Path) -> None:
    """Empty a folder that an interrupted start left half made."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
