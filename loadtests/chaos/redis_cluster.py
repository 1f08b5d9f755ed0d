"""A Redis master, two replicas, and three Sentinels that make another one the master when it is gone for a second."""

import contextlib
import hashlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import redis

from loadtests.chaos.addresses import Addresses
from loadtests.chaos.programs import Programs
from services.common.config import RedisConfig, SentinelConfig
from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.guard import Guard
from services.embedded.processes import LOOPBACK, ProcessRecord, wait_until, write_private
from services.embedded.redis import ADMIN, KEYSPACES, EmbeddedRedis
from services.embedded.supervisor import ChildSpec, Supervisor

SERVERS: Final = ("redis-1", "redis-2", "redis-3")
SENTINELS: Final = ("sentinel-1", "sentinel-2", "sentinel-3")
MASTER_NAME: Final = "fedmesh"
DOWN_AFTER_MS: Final = 1_000
FAILOVER_TIMEOUT_MS: Final = 5_000
_SENTINEL_COMMANDS: Final = "-@all +ping +info +role +client +hello +sentinel +subscribe +psubscribe +publish"


class RedisCluster:
    """Everybody, Sentinels and replicas too, reaches a server by its proxy, so that it can be cut off from all."""

    def __init__(
        self, folder: Path, programs: Programs, addresses: Addresses, supervisor: Supervisor, guard: Guard
    ) -> None:
        self.folder = folder
        self._programs = programs
        self._addresses = addresses
        self._supervisor = supervisor
        for name in (*SERVERS, *SENTINELS):
            addresses.add_store(name)
        self._servers = {
            name: EmbeddedRedis(folder / name, program=programs.redis, port=addresses.own(name), guard=guard)
            for name in SERVERS
        }

    # ---- life cycle

    def start(self, timeout_s: float = 60.0) -> None:
        """Raises: FedmeshError(STORE_UNAVAILABLE) when they do not find each other."""
        accounts.private_folder(self.folder)
        self.folder.chmod(0o711)
        for name in SERVERS:
            if name != SERVERS[0]:
                # The same passwords everywhere: a client signs in to whatever server is the master.
                shutil.copytree(self.folder / SERVERS[0] / "secrets", self.folder / name / "secrets")
            self.start_server(name, follow=None if name == SERVERS[0] else SERVERS[0])
        for name in SENTINELS:
            self._supervisor.start(self._sentinel(name))
        self.wait_whole(timeout_s)

    def start_server(self, name: str, follow: str | None = None) -> None:
        """Start a server, if it does not run; the Sentinels tell one that comes back whom to follow."""
        server = self._servers[name]
        server.start()
        with self.client(name) as client:
            for key, value in (
                ("masteruser", ADMIN),
                ("masterauth", server.password(ADMIN)),
                ("replica-announce-ip", LOOPBACK),
                ("replica-announce-port", str(self._addresses.proxied(name))),
                ("repl-diskless-sync-delay", "0"),
                ("repl-timeout", "10"),
            ):
                client.config_set(key, value)
            if follow is not None:
                client.replicaof(LOOPBACK, str(self._addresses.proxied(follow)))

    def wait_whole(self, timeout_s: float) -> None:
        """Raises: FedmeshError(STORE_UNAVAILABLE)."""
        if not wait_until(self.whole, timeout_s, interval_s=0.2):
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"Redis and its Sentinels are not whole: {self.roles()}")

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()

    # ---- looking

    @contextlib.contextmanager
    def client(self, name: str) -> "Iterator[redis.Redis]":
        """The administrator's connection to a server itself, past its proxy."""
        password = self._servers[name].password(ADMIN)
        with redis.Redis(
            port=self._addresses.own(name), username=ADMIN, password=password, socket_timeout=2.0
        ) as client:
            yield client

    def roles(self) -> dict[str, str]:
        """`master`, `slave`, or "" for a server that does not answer."""
        return {name: str(self._info(name).get("role", "")) for name in SERVERS}

    def whole(self) -> bool:
        """One master, two replicas in step with it, and three Sentinels that agree."""
        infos = [self._info(name) for name in SERVERS]
        masters = [info for info in infos if info.get("role") == "master"]
        links = [info.get("master_link_status") for info in infos if info.get("role") == "slave"]
        return (
            len(masters) == 1
            and masters[0].get("connected_slaves") == 2
            and links == ["up", "up"]
            and all(self._agrees(name) for name in SENTINELS)
        )

    def _agrees(self, sentinel: str) -> bool:
        known = self._asked(sentinel).get("master0")
        return isinstance(known, dict) and (known["slaves"], known["sentinels"], known["status"]) == (2, 3, "ok")

    def master(self) -> str:
        """The server that is the master now, as Sentinels and itself say. Raises: FedmeshError(STORE_UNAVAILABLE)."""
        found = [name for name, role in self.roles().items() if role == "master"]
        if len(found) != 1:
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"no single Redis master: {self.roles()}")
        return found[0]

    def _info(self, name: str) -> dict[str, Any]:
        try:
            with self.client(name) as client:
                return dict(client.info())
        except (redis.RedisError, OSError):
            return {}

    def _asked(self, sentinel: str) -> dict[str, Any]:
        password = self._servers[SERVERS[0]].password(ADMIN)
        try:
            with redis.Redis(
                port=self._addresses.own(sentinel), username=ADMIN, password=password, socket_timeout=2.0
            ) as client:
                return dict(client.info("sentinel"))
        except (redis.RedisError, OSError):
            return {}

    def family(self, name: str) -> list[int]:
        """Pids of a server or a Sentinel."""
        if name in self._servers:
            pid = self._servers[name].status().pid
        else:
            pid = next((child.pid for child in self._supervisor.status() if child.name == name), None)
        record = None if pid is None else ProcessRecord.of(pid)
        return [] if record is None else record.family()

    # ---- faults

    def kill_server(self, name: str) -> None:
        self._servers[name].kill()

    def signal_server(self, name: str, number: signal.Signals) -> None:
        processes.kill_all(self.family(name), number)

    # ---- access

    def password(self, user: str) -> str:
        """The password of a user, the same on every server."""
        return self._servers[SERVERS[0]].password(user)

    def config(self, user: str) -> RedisConfig:
        """How a service signs in: the Sentinels say where."""
        return RedisConfig(
            url=f"redis://{LOOPBACK}:1/0",
            username=user,
            password_file=self._servers[SERVERS[0]].password_file(user),
            sentinel=SentinelConfig(
                addresses=tuple(f"{LOOPBACK}:{self._addresses.proxied(name)}" for name in SENTINELS),
                master=MASTER_NAME,
            ),
        )

    def _sentinel(self, name: str) -> ChildSpec:
        home = accounts.private_folder(self.folder / name)
        passwords = {user: self._servers[SERVERS[0]].password(user) for user in (ADMIN, *KEYSPACES)}
        users = ["user default off"]
        for user, password in passwords.items():
            digest = hashlib.sha256(password.encode()).hexdigest()
            users.append(f"user {user} on #{digest} {'~* &* +@all' if user == ADMIN else '&* ' + _SENTINEL_COMMANDS}")
        write_private(home / "users.acl", "\n".join(users) + "\n")
        lines = [
            f"bind {LOOPBACK}",
            f"port {self._addresses.own(name)}",
            f"dir {home}",
            f"aclfile {home}/users.acl",
            f"sentinel monitor {MASTER_NAME} {LOOPBACK} {self._addresses.proxied(SERVERS[0])} 2",
            f"sentinel auth-user {MASTER_NAME} {ADMIN}",
            f"sentinel auth-pass {MASTER_NAME} {passwords[ADMIN]}",
            f"sentinel sentinel-user {ADMIN}",
            f"sentinel sentinel-pass {passwords[ADMIN]}",
            f"sentinel down-after-milliseconds {MASTER_NAME} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER_NAME} {FAILOVER_TIMEOUT_MS}",
            f"sentinel parallel-syncs {MASTER_NAME} 2",
        ]
        write_private(home / "sentinel.conf", "\n".join(lines) + "\n")
        return ChildSpec(name=name, argv=[str(self._programs.redis), str(home / "sentinel.conf"), "--sentinel"], rank=0)
