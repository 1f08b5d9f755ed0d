"""Base backups of the embedded PostgreSQL, and its restore to a point in time, by PostgreSQL's own programs."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.postgres import SUPERUSER, EmbeddedPostgres


def base_backup(server: EmbeddedPostgres, folder: Path, timeout_s: float = 300.0) -> None:
    """Copy a running server with an archive into a new folder, and verify the copy against its manifest.

    The backup holds what a restore needs: the cluster, and the files with the roles' passwords.

    Raises: FedmeshError(STORE_UNAVAILABLE) when the backup failed or is not whole.
    """
    cluster = folder / "cluster"
    folder.mkdir(mode=0o700)
    reach = ["--dbname", server.dsn(database=SUPERUSER), "--no-password"]
    how = ["--pgdata", str(cluster), "--wal-method=none", "--checkpoint=fast", "--manifest-checksums=SHA256"]
    _run([str(server.program("pg_basebackup")), *reach, *how], timeout_s)
    _verify(cluster)
    shutil.copytree(server.data_dir / "secrets", folder / "secrets")


def archive_all(server: EmbeddedPostgres, archive: Path, timeout_s: float = 60.0) -> None:
    """Close the present WAL segment and wait until the archive has it.

    Raises: FedmeshError(STORE_UNAVAILABLE) when it has not come after `timeout_s` seconds.
    """
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        # A segment in which nothing was written yet is not closed.
        connection.execute("SELECT pg_create_restore_point('archive_all')")
        row = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
    segment = archive / str(row[0] if row else "")
    if not processes.wait_until(segment.exists, timeout_s, interval_s=0.05):
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"the archive never got {segment.name}; see {server.log}")


def restore(backup: Path, archive: Path, data_dir: Path, until: datetime) -> None:
    """Lay out a new data folder from a base backup; the next start replays the archive up to a moment and opens it.

    until: with a time zone. Everything that was committed later is given up. The start fails, and says so in the
    server's log, when the archive does not reach that moment.

    Raises: FedmeshError(CONFIG_INVALID) when the folder exists, (STORE_UNAVAILABLE) when the backup is not whole.
    """
    if data_dir.exists():
        raise FedmeshError(Code.CONFIG_INVALID, f"{data_dir} exists: a restore never writes over a data folder")
    _verify(backup / "cluster")
    account = accounts.store_account()
    cluster = data_dir / "cluster"
    accounts.private_folder(data_dir)
    shutil.copytree(backup / "secrets", data_dir / "secrets")
    shutil.copytree(backup / "cluster", cluster)
    source = shlex.quote(f"{os.path.relpath(archive, cluster)}/").replace("%", "%%")
    settings = {
        "restore_command": f"cp {source}%f %p",
        "recovery_target_time": until.astimezone(UTC).isoformat(sep=" "),
        "recovery_target_action": "promote",
        # Ready only when the moment is reached: nobody reads on the way there.
        "hot_standby": "off",
    }
    with (cluster / "postgresql.auto.conf").open("a") as conf:
        conf.writelines(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
    (cluster / "recovery.signal").touch()
    for path in (cluster, *cluster.rglob("*")):
        account.own(path)
    (data_dir / "initialised").touch(mode=0o600)


def _verify(cluster: Path) -> None:
    """Compare a backup with its manifest, as `pg_verifybackup` does, which crashes in the PyPI build."""
    for entry in json.loads((cluster / "backup_manifest").read_bytes())["Files"]:
        path = cluster / entry["Path"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["Checksum"]:
            raise FedmeshError(
                Code.STORE_UNAVAILABLE, f"the backup is not whole: {entry['Path']} is not as it was read"
            )


def _run(command: list[str], timeout_s: float) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)  # noqa: S603
    if done.returncode != 0:
        raise FedmeshError(Code.STORE_UNAVAILABLE, f"{Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")
