"""Preparing a real PostgreSQL for a release, and waiting for it."""

import shutil
from pathlib import Path

import psycopg
import pytest

from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.postgres import conninfo
from services.deployment.config import DatabaseConfig, SchemaConfig
from services.deployment.database import MIGRATIONS, prepare, wait_for_schema
from services.embedded.postgres_roles import LOGIN_ROLES
from tests.support.stores import PostgresDatabase

DATABASE = "prepared"


@pytest.fixture
def settings(postgres: PostgresDatabase, tmp_path: Path) -> DatabaseConfig:
    # Roles belong to the whole server: the passwords stay what other tests know.
    server = postgres.server
    passwords = {}
    for role in LOGIN_ROLES:
        passwords[role] = tmp_path / role
        passwords[role].write_text(server.password(role))
        passwords[role].chmod(0o600)
    admin = server.config("postgres", database="postgres")
    return DatabaseConfig(admin=admin, database=DATABASE, passwords=passwords, patience_s=10)


@pytest.fixture(autouse=True)
def _dropped(postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"drop database if exists {DATABASE} with (force)")


def service(settings: DatabaseConfig, schema: str, **more: float) -> SchemaConfig:
    role = f"{schema}_service"
    dsn = psycopg.conninfo.make_conninfo(settings.admin.dsn, user=role, dbname=DATABASE)
    store = PostgresConfig(dsn=dsn, password_file=settings.passwords[role])
    return SchemaConfig(schema_name=schema, postgres=store, **more)


async def test_an_empty_server_becomes_what_services_start_on(settings: DatabaseConfig) -> None:
    with pytest.raises(FedmeshError, match=r"not prepared|cannot be reached"):
        await wait_for_schema(service(settings, "registry", patience_s=0))
    first = list(prepare(settings))
    assert "registry: applied 0001_registry" in first[1]
    assert list(prepare(settings))[1:] == ["registry: up to date", "audit: up to date"]
    for schema in ("registry", "audit"):
        await wait_for_schema(service(settings, schema))
    with psycopg.connect(conninfo(settings.admin), dbname=DATABASE) as connection:
        owners = connection.execute("select distinct tableowner from pg_tables where schemaname = 'registry'")
        assert ("registry_service",) not in owners.fetchall()


def another_release(folder: Path, monkeypatch: pytest.MonkeyPatch, oldest: int) -> None:
    """From here on the programs are of the next release, whose migration lets releases from `oldest` on run."""
    newest = max(MIGRATIONS["registry"].glob("0*.sql"))
    shutil.copytree(MIGRATIONS["registry"], folder)
    (folder / f"{int(newest.stem[:4]) + 1:04}_later.sql").write_text(
        f"-- oldest-release: {oldest:04}\nset role registry_owner;\n"
        f"alter table registry.hospitals add column later_{oldest} integer;\n"
    )
    monkeypatch.setitem(MIGRATIONS, "registry", folder)


async def test_an_older_release_runs_on_what_a_newer_one_added(
    settings: DatabaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = service(settings, "registry", patience_s=0)
    list(prepare(settings))
    await wait_for_schema(own)
    known = len(list(MIGRATIONS["registry"].glob("*.sql")))
    with monkeypatch.context() as upgrade:
        another_release(tmp_path / "newer", upgrade, known)
        with pytest.raises(FedmeshError, match=f"lacks {known + 1:04}_later"):
            await wait_for_schema(own)
        assert list(prepare(settings))[1:] == [f"registry: applied {known + 1:04}_later", "audit: up to date"]
        await wait_for_schema(own)
    # An old pod that starts again in mid-upgrade, and the rollback, with its Job, as often as somebody runs it.
    for _ in range(2):
        await wait_for_schema(own)
        assert list(prepare(settings))[1:] == ["registry: up to date", "audit: up to date"]
    with monkeypatch.context() as upgrade:
        another_release(tmp_path / "again", upgrade, known)
        assert list(prepare(settings))[1:] == ["registry: up to date", "audit: up to date"]
        await wait_for_schema(own)


async def test_an_older_release_is_refused_at_once_by_what_it_does_not_run_on(
    settings: DatabaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(prepare(settings))
    known = len(list(MIGRATIONS["registry"].glob("*.sql")))
    with monkeypatch.context() as upgrade:
        another_release(tmp_path / "newer", upgrade, known + 1)
        list(prepare(settings))
    refusal = f"{known + 1:04}_later, which needs a release that knows migration {known + 1:04}"
    with pytest.raises(FedmeshError, match=refusal):
        await wait_for_schema(service(settings, "registry", patience_s=600))
    with pytest.raises(FedmeshError, match=refusal):
        list(prepare(settings))
    # Nothing told it, as by a release from before releases said so.
    with psycopg.connect(conninfo(settings.admin), dbname=DATABASE) as connection:
        connection.execute("drop table registry._compatibility")
    with pytest.raises(FedmeshError, match="needs a release that knows"):
        await wait_for_schema(service(settings, "registry", patience_s=600))
    with pytest.raises(FedmeshError, match="needs a release that knows"):
        list(prepare(settings))


async def test_a_hole_in_the_line_of_migrations_is_not_filled(
    settings: DatabaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(prepare(settings))
    with monkeypatch.context() as upgrade:
        another_release(tmp_path / "newer", upgrade, 1)
        list(prepare(settings))
    newest = max(MIGRATIONS["registry"].glob("0*.sql")).stem
    with psycopg.connect(conninfo(settings.admin), dbname=DATABASE) as connection:
        connection.execute("delete from registry._yoyo_migration where migration_id = %s", (newest,))
    with pytest.raises(FedmeshError, match=f"lacks {newest}: no release made it"):
        list(prepare(settings))


def test_every_role_needs_its_password(settings: DatabaseConfig) -> None:
    fewer = {role: path for role, path in settings.passwords.items() if role != "audit_service"}
    with pytest.raises(FedmeshError, match="exactly these roles") as caught:
        list(prepare(settings.model_copy(update={"passwords": fewer})))
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_server_that_never_comes_up_is_named(settings: DatabaseConfig) -> None:
    away = PostgresConfig(dsn="host=127.0.0.1 port=1 user=postgres dbname=postgres")
    with pytest.raises(FedmeshError, match="did not come up in 0 s") as caught:
        list(prepare(settings.model_copy(update={"admin": away, "patience_s": 0.0})))
    assert caught.value.code is Code.STORE_UNAVAILABLE


def test_whoever_waits_hears_once_what_for(settings: DatabaseConfig) -> None:
    away = PostgresConfig(dsn="host=127.0.0.1 port=1 user=postgres dbname=postgres")
    lines = prepare(settings.model_copy(update={"admin": away, "patience_s": 3.0}))
    assert "does not answer yet" in next(lines)
    with pytest.raises(FedmeshError, match="did not come up in 3 s"):
        next(lines)
