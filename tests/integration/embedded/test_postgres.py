import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.ca import create_ca
from services.embedded.guard import Guard
from services.embedded.postgres import EmbeddedPostgres, _packaged_binaries
from tests.support.stores import PostgresDatabase

SYSTEM = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def own(tmp_path: Path, store_guard: Guard) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path / "pg", durable=False, guard=store_guard)
    yield server
    server.destroy()


def query(dsn: str, statement: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return None if row is None else row[0]


def test_data_outlives_restarts_and_crashes(own: EmbeddedPostgres) -> None:
    own.start()
    with psycopg.connect(own.dsn("registry_migrator")) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (42)")
    dsn, sockets = own.dsn(), own.socket_dir
    own.stop()
    own.stop()
    assert not own.status().running
    assert sockets.is_relative_to(own.data_dir) or not sockets.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(own.dsn())
    own.start()
    own.start()
    assert own.dsn() == dsn
    assert query(own.dsn("registry_migrator"), "SELECT n FROM kept") == 42
    own.kill()
    own.start()
    assert query(own.dsn("registry_migrator"), "SELECT n FROM kept") == 42
    status = own.status()
    assert status.running
    assert status.version


def test_another_process_finds_and_stops_the_server(own: EmbeddedPostgres) -> None:
    own.start()
    other = EmbeddedPostgres(own.data_dir)
    assert other.status().pid == own.status().pid
    other.stop()
    assert not own.status().running


def test_a_server_whose_record_is_lost_is_found_by_its_folder(own: EmbeddedPostgres) -> None:
    own.start()
    pid = own.status().pid
    own._save_state(pid=1, mark="lost")
    assert EmbeddedPostgres(own.data_dir).status().pid == pid


def test_a_stale_lock_with_a_recycled_pid_does_not_stop_a_start(own: EmbeddedPostgres, tmp_path: Path) -> None:
    own.start()
    lock = own.data_dir / "cluster" / "postmaster.pid"
    lines = lock.read_text().splitlines()
    own.kill()
    # PostgreSQL believes a lock whose pid is a live process of its own account.
    stranger = processes.spawn(["sleep", "60"], tmp_path / "log", account=accounts.store_account())
    try:
        lock.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        accounts.store_account().own(lock)
        own._save_state(pid=stranger.pid, mark="an earlier process")
        assert not own.status().running
        own.stop()
        own.start()
        assert own.status().pid != stranger.pid
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_interrupted_first_start_is_repeated(own: EmbeddedPostgres) -> None:
    half = own.data_dir / "cluster"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    (half / "base").mkdir()
    own.start()
    assert query(own.dsn(), "SELECT 1") == 1


def test_tcp_and_socket_take_passwords_only(tmp_path: Path, store_guard: Guard) -> None:
    server = EmbeddedPostgres(tmp_path / "pg", port=processes.free_port(), durable=False, guard=store_guard)
    try:
        server.start()
        assert query(server.dsn("audit_service", tcp=True), "SELECT current_user") == "audit_service"
        for tcp in (False, True):
            config = server.config("audit_service", tcp=tcp)
            assert config.password_file is not None
            assert config.password_file.read_text().strip() not in config.dsn
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(config.dsn, passfile=os.devnull, password="wrong")
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(config.dsn, passfile=os.devnull)
    finally:
        server.destroy()


def test_secrets_and_sockets_are_private(own: EmbeddedPostgres) -> None:
    own.start()
    secrets = own.data_dir / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}
    assert stat.S_IMODE(own.socket_dir.stat().st_mode) == 0o700
    passwords = {own.password(file.stem) for file in secrets.glob("*.password")}
    assert len(passwords) == 5
    pid = own.status().pid
    shown = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text() + own.log.read_text()
    assert not [password for password in passwords if password in shown]


def test_durable_is_the_default(tmp_path: Path, store_guard: Guard) -> None:
    server = EmbeddedPostgres(tmp_path / "pg", guard=store_guard)
    try:
        server.start()
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert query(server.dsn(), f"SHOW {setting}") == "on"
    finally:
        server.destroy()


# ---- refusals


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FedmeshError, match=str(port)) as caught:
            EmbeddedPostgres(tmp_path / "pg", port=port).start()
    assert caught.value.code is Code.CONFIG_INVALID


def test_tls_is_refused_by_a_build_without_it(tmp_path: Path) -> None:
    tls = create_ca(tmp_path / "ca", "demo").issue_service("postgres")
    server = EmbeddedPostgres(tmp_path / "pg", port=processes.free_port(), tls=tls, durable=False)
    with pytest.raises(FedmeshError, match="without it") as caught:
        server.start()
    assert caught.value.code is Code.CONFIG_INVALID
    assert not server.status().running


@pytest.mark.skipif(not SYSTEM.exists(), reason="no system PostgreSQL")
def test_a_system_build_speaks_tls(tmp_path: Path, store_guard: Guard) -> None:
    tls = create_ca(tmp_path / "ca", "demo").issue_service("postgres")
    server = EmbeddedPostgres(
        tmp_path / "pg", binaries=SYSTEM, port=processes.free_port(), tls=tls, durable=False, guard=store_guard
    )
    try:
        server.start()
        dsn = server.dsn("registry_service", tcp=True)
        assert query(dsn, "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == "TLSv1.3"
        with pytest.raises(psycopg.OperationalError, match="no encryption"):
            psycopg.connect(dsn, sslmode="disable")
        server.stop()
        with pytest.raises(FedmeshError, match="made by PostgreSQL 15"):
            EmbeddedPostgres(server.data_dir).start()
    finally:
        server.destroy()


def test_programs_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="install PostgreSQL") as caught:
        EmbeddedPostgres(tmp_path / "pg", binaries=tmp_path).start()
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "pg").write_text("")
    with pytest.raises(FedmeshError, match="data folder") as caught:
        EmbeddedPostgres(tmp_path / "pg").start()
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused_and_left_alone(own: EmbeddedPostgres) -> None:
    own.start()
    own.stop()
    cluster = own.data_dir / "cluster"
    os.chown(cluster, 12345, 12345)
    with pytest.raises(FedmeshError, match="another user") as caught:
        own.start()
    assert caught.value.code is Code.CONFIG_INVALID
    assert cluster.stat().st_uid == 12345


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    server = EmbeddedPostgres(tmp_path / "pg", durable=False)
    try:
        with pytest.raises(FedmeshError, match=r"disk is full|no space") as caught:
            server.start()
        assert caught.value.code is Code.STORE_FULL
        assert not server.status().running
    finally:
        server.destroy()
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- accounts


@pytest.mark.skipif(os.geteuid() != 0, reason="a normal user's programs are always in reach")
def test_root_may_install_and_keep_data_where_only_root_may_enter(
    tmp_path: Path, store_guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(tempfile.mkdtemp())
    monkeypatch.setattr(accounts, "CACHE_ROOT", cache)
    programs = _packaged_binaries()
    site = tmp_path / "closed" / "site"
    installed = site / programs.relative_to(programs.parents[2])
    shutil.copytree(programs.parent, installed.parent, symlinks=True)
    libraries = f"{programs.parents[1].name}.libs"
    shutil.copytree(programs.parents[2] / libraries, site / libraries)
    tmp_path.joinpath("closed").chmod(0o700)
    monkeypatch.setattr("services.embedded.postgres._packaged_binaries", lambda: installed)
    server = EmbeddedPostgres(tmp_path / "closed" / "data", durable=False, guard=store_guard)
    try:
        server.start()
        assert query(server.dsn("audit_service"), "SELECT 1") == 1
        assert os.stat(f"/proc/{server.status().pid}").st_uid == accounts.store_account().uid
    finally:
        server.destroy()
        shutil.rmtree(cache)


# ---- privileges


def test_what_a_migrator_makes_belongs_to_the_owner(postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn("registry_migrator")) as connection:
        connection.execute("CREATE TABLE t (n int)")
    assert query(postgres.dsn(), "SELECT tableowner FROM pg_tables WHERE tablename = 't'") == "registry_owner"
    assert query(postgres.dsn(), "SELECT schemaname FROM pg_tables WHERE tablename = 't'") == "registry"


@pytest.mark.parametrize(("mine", "other"), [("registry", "audit"), ("audit", "registry")])
def test_services_reach_their_own_schema_and_nothing_else(postgres: PostgresDatabase, mine: str, other: str) -> None:
    for schema in (mine, other):
        with psycopg.connect(postgres.dsn(f"{schema}_migrator")) as connection:
            connection.execute("CREATE TABLE t (n int)")
            connection.execute(f"GRANT SELECT, INSERT ON t TO {schema}_service".encode())
            connection.execute("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    service = postgres.dsn(f"{mine}_service")
    assert query(service, "SELECT count(*) FROM t") == 0
    denied = [
        (service, f"SELECT * FROM {other}.t"),
        (service, f"INSERT INTO {other}.t VALUES (1)"),
        (service, f"SELECT {other}.f()"),
        (service, "SELECT f()"),
        (service, "DELETE FROM t"),
        (service, "CREATE TABLE u (n int)"),
        (service, "CREATE TABLE public.u (n int)"),
        (service, "CREATE TEMP TABLE u (n int)"),
        (service, "CREATE SCHEMA u"),
        (service, f"SET ROLE {mine}_owner"),
        (service, f"SET ROLE {other}_service"),
        (service, "COPY (SELECT 1) TO PROGRAM 'true'"),
        (service, "SELECT pg_read_file('PG_VERSION')"),
        (postgres.dsn(f"{mine}_migrator"), f"SELECT * FROM {other}.t"),
        (postgres.dsn(f"{mine}_migrator"), f"CREATE TABLE {other}.u (n int)"),
        (postgres.dsn(f"{mine}_migrator"), f"SET ROLE {other}_owner"),
    ]
    for dsn, statement in denied:
        with psycopg.connect(dsn) as connection, pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement.encode())


def test_service_roles_have_no_powers_and_owners_cannot_sign_in(postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        rows = connection.execute(
            "SELECT rolname, rolcanlogin, rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication "
            "FROM pg_roles WHERE rolname ~ '^(registry|audit)_'"
        ).fetchall()
    assert {name: login for name, login, _ in rows} == {
        f"{schema}_{part}": part != "owner"
        for schema in ("registry", "audit")
        for part in ("owner", "migrator", "service")
    }
    assert not any(powers for _, _, powers in rows)


def test_other_databases_are_closed_to_services(postgres: PostgresDatabase) -> None:
    for database in ("postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            psycopg.connect(postgres.server.dsn("registry_service", database=database))


def test_every_test_gets_an_empty_database_and_a_running_server(postgres: PostgresDatabase) -> None:
    assert query(postgres.dsn(), "SELECT count(*) FROM pg_tables WHERE schemaname IN ('registry', 'audit')") == 0
    postgres.stop()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres.dsn("registry_service"))
    postgres.start()
    assert query(postgres.dsn("registry_service"), "SELECT current_database()") == postgres.name


def test_a_start_that_fails_half_way_leaves_nothing_running_and_can_be_repeated(
    own: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_database: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "create_database", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.start()
    monkeypatch.undo()
    assert not own.status().running
    own.start()
    assert query(own.dsn("audit_service"), "SELECT 1") == 1
