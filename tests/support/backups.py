"""Ways to back PostgreSQL up and to restore it to a moment: the project's own, pgBackRest, and Barman's cloud tools.

The two latter keep nothing of PostgreSQL's but its data folder, so the files with the roles' passwords, which are the
embedded server's own, are kept beside. Their programs run as the server's account, as in production.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

import psycopg
from psycopg import sql

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes, recovery
from services.embedded.guard import Guard
from services.embedded.postgres import SUPERUSER, EmbeddedPostgres
from services.embedded.processes import LOOPBACK, ProcessRecord
from tests.support import backup_programs

STANZA: Final = "fedmesh"
_TIMEOUT_S: Final = 300.0


class Backups(ABC):
    """In `folder`, which the servers' account can enter: the disks of `primary` and `restored`, and what is kept."""

    name: ClassVar[str]
    # Of Debian, with the program that shows that it is there.
    packages: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path, guard: Guard) -> None:
        self.folder = folder
        self.guard = guard

    @abstractmethod
    def start_primary(self) -> EmbeddedPostgres:
        """Start a server whose WAL is archived."""

    def first_backup(self, server: EmbeddedPostgres) -> None:
        """The backup of before, which the next one builds on, where the tool has such."""
        del server

    @abstractmethod
    def backup(self, server: EmbeddedPostgres) -> str:
        """Back a running server up; says what there is now."""

    @abstractmethod
    def restore(self, until: datetime) -> EmbeddedPostgres:
        """Lay out `restored`; its next start replays the archive up to a moment and opens it.

        Raises: FedmeshError when there is one.
        """

    def archive_all(self, server: EmbeddedPostgres) -> None:
        """Close the present WAL segment and wait until the archive has it."""
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            # A segment in which nothing was written yet is not closed.
            connection.execute("select pg_create_restore_point('all')")
            row = connection.execute("select pg_walfile_name(pg_switch_wal())").fetchone()
            assert row is not None
            asked = "select last_archived_wal >= %s from pg_stat_archiver"
            assert processes.wait_until(lambda: connection.execute(asked, row).fetchone() == (True,), 60), server.log

    def close(self) -> None:
        for name in ("primary", "restored"):
            EmbeddedPostgres(self.folder / name, guard=self.guard).destroy()


class OwnBackups(Backups):
    """`pg_basebackup` and `cp` (`services.embedded.recovery`), on the PostgreSQL that the lock brings."""

    name = "pg_basebackup"

    @property
    def _archive(self) -> Path:
        return self.folder / "archive"

    def start_primary(self) -> EmbeddedPostgres:
        server = EmbeddedPostgres(self.folder / "primary", archive=self._archive, guard=self.guard)
        server.start()
        return server

    def backup(self, server: EmbeddedPostgres) -> str:
        recovery.base_backup(server, self.folder / "backup")
        return "one base backup, as its manifest says"

    def archive_all(self, server: EmbeddedPostgres) -> None:
        recovery.archive_all(server, self._archive)

    def restore(self, until: datetime) -> EmbeddedPostgres:
        recovery.restore(self.folder / "backup", self._archive, self.folder / "restored", until)
        return EmbeddedPostgres(self.folder / "restored", guard=self.guard)


class _ToolBackups(Backups):
    """A tool of Debian's on Debian's PostgreSQL."""

    def __init__(self, folder: Path, guard: Guard) -> None:
        super().__init__(folder, guard)
        programs = backup_programs.postgres_folder()
        assert programs is not None
        self.programs = programs
        self.account = accounts.store_account()
        self.kept = accounts.private_folder(folder / "kept", self.account)

    @abstractmethod
    def _archive_command(self) -> list[str]:
        """What PostgreSQL runs for a segment; `%p` is its path."""

    def _prepare(self, server: EmbeddedPostgres) -> None:
        """What the tool needs before the first segment comes."""

    def start_primary(self) -> EmbeddedPostgres:
        server = EmbeddedPostgres(self.folder / "primary", binaries=self.programs, guard=self.guard)
        server.start()
        passwords = self.kept / "pgpass"
        processes.write_private(passwords, server.passfile(SUPERUSER).read_text())
        self.account.own(passwords)
        self._prepare(server)
        settings = {"archive_mode": "on", "archive_command": shlex.join(self._archive_command())}
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for name, value in settings.items():
                connection.execute(sql.SQL("alter system set {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        server.stop()
        server.start()
        shutil.copytree(server.data_dir / "secrets", self.folder / "secrets")
        return server

    def restore(self, until: datetime) -> EmbeddedPostgres:
        data_dir = accounts.private_folder(self.folder / "restored")
        data_dir.chmod(0o711)
        cluster = accounts.private_folder(data_dir / "cluster", self.account)
        self._restore(cluster, f"{until.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00")
        shutil.copytree(self.folder / "secrets", data_dir / "secrets")
        (data_dir / "initialised").touch(mode=0o600)
        with (cluster / "postgresql.auto.conf").open("a") as conf:
            # Ready only when the moment is reached: nobody reads on the way there.
            conf.write("hot_standby = off\n")
        return EmbeddedPostgres(data_dir, binaries=self.programs, guard=self.guard)

    @abstractmethod
    def _restore(self, cluster: Path, until: str) -> None: ...

    def run(self, argv: Sequence[str | Path]) -> str:
        """Run a program of the tool to its end; what it printed.

        Raises: FedmeshError(STORE_UNAVAILABLE) when it failed.
        """
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGPASSFILE": str(self.kept / "pgpass"), "HOME": "/"}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            cwd="/",
            env=environment,
            **self.account.popen_arguments(),
        )
        if done.returncode != 0:
            raise FedmeshError(Code.STORE_UNAVAILABLE, f"{' '.join(map(str, argv))}: {done.stdout}{done.stderr}")
        return done.stdout


class PgBackRest(_ToolBackups):
    """A full backup and an incremental one, in a repository that is a folder."""

    name = "pgBackRest"
    packages: ClassVar = backup_programs.PGBACKREST

    def _command(self, *arguments: str) -> list[str]:
        return ["pgbackrest", f"--config={self.kept / 'pgbackrest.conf'}", f"--stanza={STANZA}", *arguments]

    def _archive_command(self) -> list[str]:
        return self._command("archive-push", "%p")

    def _prepare(self, server: EmbeddedPostgres) -> None:
        settings = {
            "repo1-path": self.kept / "repository",
            "repo1-retention-full": 2,
            "lock-path": self.kept / "lock",
            "spool-path": self.kept / "spool",
            "log-level-file": "off",
            "log-level-console": "warn",
            "start-fast": "y",
        }
        source = {
            "pg1-path": server.data_dir / "cluster",
            "pg1-socket-path": server.socket_dir,
            "pg1-user": SUPERUSER,
        }
        parts = {"global": settings, STANZA: source}
        text = "".join(f"[{part}]\n" + "".join(f"{k}={v}\n" for k, v in given.items()) for part, given in parts.items())
        (self.kept / "pgbackrest.conf").write_text(text)
        self.run(self._command("stanza-create"))

    def first_backup(self, server: EmbeddedPostgres) -> None:
        self.run(self._command("check"))
        self.run(self._command("--type=full", "backup"))

    def backup(self, server: EmbeddedPostgres) -> str:
        self.run(self._command("--type=incr", "backup"))
        (stanza,) = json.loads(self.run(self._command("--output=json", "info")))
        found = [(item["type"], item["info"]["repository"]["delta"], item["error"]) for item in stanza["backup"]]
        assert [(kind, failed) for kind, _, failed in found] == [("full", False), ("incr", False)]
        assert found[1][1] < found[0][1]
        return " and ".join(f"{kind} of {size / 1024:.0f} KiB" for kind, size, _ in found) + ", checksums verified"

    def _restore(self, cluster: Path, until: str) -> None:
        # Not into the archive that it comes from: this is how a restore is tried beside a server that still runs.
        how = [f"--pg1-path={cluster}", "--type=time", f"--target={until}", "--target-action=promote"]
        self.run(self._command(*how, "--archive-mode=off", "restore"))


class BarmanCloud(_ToolBackups):
    """What CloudNativePG's Barman Cloud plugin runs, against an S3 on this machine."""

    name = "barman-cloud"
    packages: ClassVar = backup_programs.BARMAN

    def __init__(self, folder: Path, guard: Guard) -> None:
        super().__init__(folder, guard)
        self.port = processes.free_port()
        self.child: subprocess.Popen[bytes] | None = None

    def _command(self, program: str, *arguments: str) -> list[str]:
        # Any name and secret do: the S3 is ours, on loopback, and asks for none.
        account = ["AWS_ACCESS_KEY_ID=nobody", "AWS_SECRET_ACCESS_KEY=none", "AWS_DEFAULT_REGION=us-east-1"]
        where = [f"--endpoint-url=http://{LOOPBACK}:{self.port}"]
        return ["/usr/bin/env", *account, f"barman-cloud-{program}", *where, *arguments]

    def _archive_command(self) -> list[str]:
        return self._command("wal-archive", "s3://backups", STANZA, "%p")

    def _prepare(self, server: EmbeddedPostgres) -> None:
        program = backup_programs.s3_server()
        assert program is not None
        with (self.folder / "s3.log").open("wb") as log:
            self.child = subprocess.Popen(
                [program, "-H", LOOPBACK, "-p", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.guard.environment()},
            )
        record = ProcessRecord.of(self.child.pid)
        assert record is not None
        self.guard.add(record, signum=signal.SIGTERM, grace_s=5.0, rank=0)
        assert processes.wait_until(self._answers, 60), (self.folder / "s3.log").read_text()

    def _answers(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex((LOOPBACK, self.port)) == 0

    def backup(self, server: EmbeddedPostgres) -> str:
        reach = [f"--host={server.socket_dir}", f"--user={SUPERUSER}", "--immediate-checkpoint"]
        self.run(self._command("backup", *reach, "s3://backups", STANZA))
        (found,) = self._list()
        assert found["status"] == "DONE"
        return f"base backup {found['backup_id']} in an S3"

    def _list(self) -> list[dict[str, Any]]:
        said = json.loads(self.run(self._command("backup-list", "--format=json", "s3://backups", STANZA)))
        return list(said["backups_list"])

    def _restore(self, cluster: Path, until: str) -> None:
        (backup,) = self._list()
        if any(cluster.iterdir()):
            raise FedmeshError(Code.CONFIG_INVALID, f"{cluster} is not empty")
        self.run(self._command("restore", "s3://backups", STANZA, str(backup["backup_id"]), str(cluster)))
        settings = {
            "archive_mode": "off",
            "restore_command": shlex.join(self._command("wal-restore", "s3://backups", STANZA, "%f", "%p")),
            "recovery_target_time": until,
            "recovery_target_action": "promote",
        }
        with (cluster / "postgresql.auto.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        signal_file = cluster / "recovery.signal"
        signal_file.touch()
        self.account.own(signal_file)

    def close(self) -> None:
        super().close()
        if self.child is not None:
            self.child.terminate()
            self.child.wait(30)


TOOLS: Final = (OwnBackups, PgBackRest, BarmanCloud)


def why_not(tool: type[Backups]) -> str:
    """What is missing for a tool; empty when nothing is."""
    missing = backup_programs.lacking(tool.packages) if tool.packages else []
    if missing:
        return f"no {', '.join(missing)} here (`make restore-drill` as root on Debian installs them)"
    if tool is BarmanCloud and backup_programs.s3_server() is None:
        return "no local S3 here (`make restore-drill` installs moto from PyPI)"
    return ""
