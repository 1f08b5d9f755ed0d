"""A real PostgreSQL and a real Redis for tests: started once a pytest process, empty for every test.

`postgres` is a fresh database with schemas and roles but without migrations. `redis_server` is an emptied server with
its ACL users. Both may be stopped, killed and started again by a test; the next test finds them running and empty.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis

from services.common.config import PostgresConfig, RedisConfig
from services.embedded.guard import Guard
from services.embedded.postgres import SUPERUSER, EmbeddedPostgres
from services.embedded.redis import ADMIN, EmbeddedRedis

_numbers = itertools.count()


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
def _redis_process(tmp_path_factory: pytest.TempPathFactory, store_guard: Guard) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), durable=False, guard=store_guard)
    server.start()
    yield server
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
def redis_server(_redis_process: EmbeddedRedis) -> RedisServer:
    """An empty Redis."""
    server = _redis_process
    server.start()
    with server.client() as admin:
        admin.flushall()
    return RedisServer(server)
