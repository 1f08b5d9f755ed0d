"""Three PostgreSQL servers under Patroni, which keeps its lock in etcd: a primary and two synchronous standbys.

A commit is acknowledged when one of the two standbys has it on disk too (`synchronous_mode: quorum`), and only a
standby that has every acknowledged commit may take over.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

import psycopg
import yaml
from psycopg.conninfo import make_conninfo

from loadtests.chaos.addresses import Addresses
from loadtests.chaos.disks import mount_disk, unmount
from loadtests.chaos.programs import Programs
from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.embedded import accounts, postgres_roles, processes
from services.embedded.postgres import DATABASE, SUPERUSER, _packaged_binaries
from services.embedded.processes import LOOPBACK, ProcessRecord, wait_until, write_private
from services.embedded.supervisor import ChildSpec, Supervisor

NODES: Final = ("postgres-1", "postgres-2", "postgres-3")
ETCD: Final = "etcd"
REPLICATOR: Final = "replicator"
SCOPE: Final = "fedmesh"
# The least that Patroni accepts: a primary that is frozen or cut off keeps its lock for so long.
TTL_S: Final = 20
_REAPER: Final = Path(__file__).with_name("reaper.py")


class PatroniCluster:
    """The servers' data is below `folder`; everything is a child of `supervisor`."""

    def __init__(self, folder: Path, programs: Programs, addresses: Addresses, supervisor: Supervisor) -> None:
        self._programs = programs
        self._addresses = addresses
        self._supervisor = supervisor
        self._account = accounts.store_account()
        # Patroni goes by absolute paths, which its account must be able to walk.
        made = next(parent for parent in folder.parents if parent.exists())
        self.folder = folder if self._account.can_enter(made) else accounts.CACHE_ROOT / "chaos-postgres"
        # Short, for the Unix sockets in it, and open to the servers' account.
        self._sockets = Path(tempfile.mkdtemp(prefix="fedmesh-pg-"))
        self._account.own(self._sockets)
        for name in (*NODES, ETCD):
            addresses.add_store(name)
        for name in NODES:
            addresses.add_store(f"{name}-api")

    # ---- life cycle

    def prepare(self, *, disks: bool) -> None:
        """Make folders, passwords and configurations, anew. disks: mount one for each node, where that is possible."""
        shutil.rmtree(self.folder, ignore_errors=True)
        accounts.private_folder(self.folder)
        self.folder.chmod(0o711)
        for role in (SUPERUSER, REPLICATOR, *postgres_roles.LOGIN_ROLES):
            file = self.password_file(role)
            if not file.exists():
                write_private(file, os.urandom(24).hex() + "\n")
        for name in NODES:
            accounts.private_folder(self.folder / name)
            if disks:
                mount_disk(self.folder / f"{name}.img", self.folder / name)
            home = accounts.private_folder(self.folder / name, self._account)
            write_private(home / "patroni.yaml", yaml.safe_dump(self._config(name)))
            self._account.own(home / "patroni.yaml")

    def start(self, timeout_s: float = 180.0) -> None:
        """Start etcd and the three nodes, and wait for a primary with two standbys that stream.

        Raises: FedmeshError(STORE_UNAVAILABLE).
        """
        self._supervisor.start(self._etcd())
        for name in NODES:
            self.start_node(name)
        self.wait_whole(timeout_s)
        self._create_roles()

    def start_node(self, name: str) -> None:
        """Start a node's Patroni, which starts its PostgreSQL; one that runs is left alone."""
        running = {child.name for child in self._supervisor.status() if child.running}
        if name not in running:
            self._supervisor.start(self._spec(name))

    def wait_whole(self, timeout_s: float) -> None:
        """Wait until one node leads and the other two stream from it. Raises: FedmeshError(STORE_UNAVAILABLE)."""
        if not wait_until(self.whole, timeout_s, interval_s=0.2):
            raise FedmeshError(
                Code.STORE_UNAVAILABLE,
                f"PostgreSQL's cluster is not whole after {timeout_s:g} s: {self.members()}; logs in "
                f"{self._supervisor.run_dir}",
            )

    def stop(self) -> None:
        """After the supervisor has ended its own: end what it does not know, and remove sockets and disks.

        A PostgreSQL is no child of its Patroni, and outlives one that had to be killed.
        """
        for name in NODES:
            processes.kill_all(self.family(name))
            unmount(self.folder / name)
        shutil.rmtree(self._sockets, ignore_errors=True)

    # ---- looking

    def members(self) -> dict[str, tuple[str, str]]:
        """Role and state of each node, as any of the nodes that answer sees the cluster."""
        for name in NODES:
            try:
                url = f"http://{LOOPBACK}:{self._addresses.own(name + '-api')}/cluster"
                with urllib.request.urlopen(url, timeout=1) as answer:
                    found = json.load(answer)
            except (OSError, ValueError, urllib.error.URLError):
                continue
            return {item["name"]: (item["role"], item["state"]) for item in found.get("members", [])}
        return {}

    def whole(self) -> bool:
        roles = sorted(self.members().values())
        followers = [state for role, state in roles if role in ("sync_standby", "quorum_standby")]
        return len(roles) == 3 and ("leader", "running") in roles and followers == ["streaming"] * 2

    def primary(self) -> str:
        """The name of the node that leads now. Raises: FedmeshError(STORE_UNAVAILABLE) when there is none."""
        found = [name for name, (role, _) in self.members().items() if role == "leader"]
        if not found:
            raise FedmeshError(Code.STORE_UNAVAILABLE, "no PostgreSQL node leads")
        return found[0]

    def wait_replaced(self, name: str, timeout_s: float) -> None:
        """Wait until another node than this one leads; until then the cluster may still call itself whole."""
        wait_until(lambda: any(n != name and r == "leader" for n, (r, _) in self.members().items()), timeout_s, 0.2)

    def family(self, name: str) -> list[int]:
        """The pids of a node: Patroni and its PostgreSQL, whose postmaster leads a session of its own."""
        pids = []
        for child in self._supervisor.status():
            if child.name == name and child.running:
                record = ProcessRecord.of(child.pid)
                pids += [] if record is None else record.family()
        postmaster = self.postmaster(name)
        record = None if postmaster is None else ProcessRecord.of(postmaster)
        return sorted({*pids, *([] if record is None else record.family())})

    def postmaster(self, name: str) -> int | None:
        """The pid in the server's own pid file; None when there is none."""
        try:
            return int((self.folder / name / "data" / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None

    # ---- faults

    def kill_server(self, name: str) -> None:
        """SIGKILL to PostgreSQL alone: Patroni sees it and acts."""
        postmaster = self.postmaster(name)
        record = None if postmaster is None else ProcessRecord.of(postmaster)
        if record is not None:
            # At once: finding its family takes a second on a busy machine, in which a fault may have begun already.
            record.signal(signal.SIGKILL)
            processes.end_families([(record, signal.SIGKILL)], 5.0)

    def kill_node(self, name: str) -> None:
        """SIGKILL to Patroni and PostgreSQL at once, as a machine that loses its power."""
        processes.kill_all(self.family(name))
        self._supervisor.kill(name)

    def signal_node(self, name: str, number: int) -> None:
        processes.kill_all(self.family(name), number)

    # ---- access

    def password_file(self, role: str) -> Path:
        return self.folder / f"{role}.password"

    def dsn(self, role: str, database: str = DATABASE) -> str:
        """All three nodes by way of their proxies; libpq and psycopg find the one that takes writes."""
        ports = [str(self._addresses.proxied(name)) for name in NODES]
        return make_conninfo(
            host=",".join([LOOPBACK] * len(ports)),
            port=",".join(ports),
            dbname=database,
            user=role,
            target_session_attrs="read-write",
        )

    def config(self, role: str) -> PostgresConfig:
        return PostgresConfig(dsn=self.dsn(role), password_file=self.password_file(role))

    def connect(self, role: str = SUPERUSER, database: str = DATABASE) -> "psycopg.Connection[tuple[Any, ...]]":
        """Raises: psycopg.OperationalError."""
        password = self.password_file(role).read_text().strip()
        return psycopg.connect(self.dsn(role, database), password=password, autocommit=True, connect_timeout=3)

    def _create_roles(self) -> None:
        with self.connect(database=SUPERUSER) as connection:
            postgres_roles.create_roles(connection)
            for role in postgres_roles.LOGIN_ROLES:
                postgres_roles.set_password(connection, role, self.password_file(role).read_text().strip())
            postgres_roles.create_database(connection, DATABASE)
        with self.connect() as connection:
            postgres_roles.create_schemas(connection, DATABASE)

    # ---- configurations

    def _etcd(self) -> ChildSpec:
        url = f"http://{LOOPBACK}:{self._addresses.own(ETCD)}"
        # What it calls itself is where Patroni goes, whatever address it was told first.
        known_as = f"http://{LOOPBACK}:{self._addresses.proxied(ETCD)}"
        peer = f"http://{LOOPBACK}:{processes.free_port()}"
        home = accounts.private_folder(self.folder / ETCD)
        return ChildSpec(
            name=ETCD,
            argv=[
                *(str(self._programs.etcd), "--name", ETCD, "--data-dir", str(home / "data"), "--logger", "zap"),
                *("--listen-client-urls", url, "--advertise-client-urls", known_as, "--listen-peer-urls", peer),
                *("--initial-advertise-peer-urls", peer, "--initial-cluster", f"{ETCD}={peer}"),
            ],
            env={"ETCD_UNSUPPORTED_ARCH": "arm64"},
            rank=-1,
        )

    def _spec(self, name: str) -> ChildSpec:
        home = self.folder / name
        argv = [str(self._programs.patroni), "patroni.yaml"]
        if self._account.drop:
            # Patroni runs as PostgreSQL's account. `setpriv` is part of util-linux, which every Debian has.
            ids = (f"--reuid={self._account.uid}", f"--regid={self._account.gid}")
            argv = ["setpriv", *ids, "--clear-groups", "--", *argv]
        argv = [sys.executable, "-I", str(_REAPER), *argv]
        return ChildSpec(name=name, argv=argv, cwd=home, env={"HOME": str(home), "PYTHONPATH": ""}, rank=0)

    def _config(self, name: str) -> dict[str, Any]:
        api, server = self._addresses.links[f"{name}-api"], self._addresses.links[name]
        passwords = {role: self.password_file(role).read_text().strip() for role in (SUPERUSER, REPLICATOR)}
        binaries = _packaged_binaries()
        site, package = binaries.parents[2], binaries.parents[1].name
        tree = binaries.parent.relative_to(site)
        parts = (*(tree / part for part in ("bin", "lib", "share")), Path(f"{package}.libs"))
        programs = accounts.reachable_program(site, binaries / "postgres", self._account, parts).parent
        return {
            "scope": SCOPE,
            "name": name,
            "restapi": {
                "listen": f"{LOOPBACK}:{api['to_port']}",
                "connect_address": f"{LOOPBACK}:{api['port']}",
            },
            "etcd3": {"host": f"{LOOPBACK}:{self._addresses.proxied(ETCD)}"},
            "bootstrap": {"dcs": _DCS, "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"]},
            "postgresql": {
                "listen": f"{LOOPBACK}:{server['to_port']}",
                "connect_address": f"{LOOPBACK}:{server['port']}",
                "data_dir": "data",
                "bin_dir": str(programs),
                "use_unix_socket": True,
                "pgpass": str(self.folder / name / "pgpass"),
                "authentication": {
                    "superuser": {"username": SUPERUSER, "password": passwords[SUPERUSER]},
                    "replication": {"username": REPLICATOR, "password": passwords[REPLICATOR]},
                },
                "pg_hba": [
                    "local all all scram-sha-256",
                    f"host all all {LOOPBACK}/32 scram-sha-256",
                    f"host replication {REPLICATOR} {LOOPBACK}/32 scram-sha-256",
                ],
                "parameters": {"unix_socket_directories": str(self._sockets)},
            },
        }


_DCS: Final[dict[str, Any]] = {
    "ttl": TTL_S,
    "loop_wait": 1,
    "retry_timeout": 3,
    # A primary that dies is replaced at once, not started again.
    "primary_start_timeout": 0,
    "synchronous_mode": "quorum",
    "synchronous_node_count": 1,
    # Without a standby nothing is acknowledged: else a primary that is cut off goes on alone.
    "synchronous_mode_strict": True,
    "postgresql": {
        "use_pg_rewind": True,
        "use_slots": True,
        "parameters": {
            "shared_buffers": "64MB",
            "max_connections": 100,
            "max_wal_size": "256MB",
            "wal_keep_size": "256MB",
            "password_encryption": "scram-sha-256",
            "huge_pages": "off",
            "jit": "off",
            "timezone": "UTC",
            "wal_sender_timeout": "5s",
            "wal_receiver_timeout": "5s",
            "wal_receiver_status_interval": "1s",
            "wal_retrieve_retry_interval": "500ms",
        },
    },
}
