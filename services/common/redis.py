"""Redis: a client of one ACL user, errors mapped, Lua scripts loaded from files."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff

from services.common.config import RedisConfig, SentinelConfig, read_secret
from services.common.errors import Code, FedmeshError

# Since Redis 7 an error inside a script is told with other words around it.
_DEMOTED: Final = re.compile(r"(^|-)READONLY\b")
_FULL: Final = re.compile(r"(^|-)(MISCONF|OOM|LOADING|TRYAGAIN)\b")
# What uvloop says, by a RuntimeError, of a transport that closed under redis-py's hands.
_CLOSED: Final = "handler is closed"


def connect_redis(config: RedisConfig) -> aioredis.Redis:
    """A client with a connection pool; it reconnects by itself, also to a new master. Values are bytes."""
    password = read_secret(config.password_file) if config.password_file is not None else None
    account: dict[str, Any] = {"username": config.username, "password": password}
    if config.sentinel is not None:
        return _master(config.url, config.sentinel, account)
    return aioredis.Redis.from_url(config.url, **account, **_settings(), max_connections=64)


def _settings() -> dict[str, Any]:
    return {
        "socket_timeout": 5.0,
        "socket_connect_timeout": 2.0,
        "health_check_interval": 15,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), retries=2),
        "protocol": 2,
    }


def _master(url: str, sentinel: SentinelConfig, account: dict[str, Any]) -> aioredis.Redis:
    """A client of whatever server the Sentinels call the master when a connection is made."""
    parts = {name: value for name, value in parse_url(url).items() if name not in ("host", "port")}
    secure = parts.pop("connection_class", None) is aioredis.SSLConnection
    # The first one that answers is enough; one whose machine is gone must not hold up the others.
    asking = {**account, **{name: value for name, value in parts.items() if name.startswith("ssl_")}, "ssl": secure}
    asking |= {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
    addresses = [(host.strip("[]"), int(port)) for host, port in (item.rsplit(":", 1) for item in sentinel.addresses)]
    watchers = Sentinel(addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    settings = {**_settings(), **parts, **account, "ssl": secure, "max_connections": 64}
    client: aioredis.Redis = watchers.master_for(sentinel.master, **settings)
    return client


@asynccontextmanager
async def redis_errors() -> AsyncIterator[None]:
    """Turn a lost or full Redis into FedmeshError(STORE_UNAVAILABLE) or (STORE_FULL)."""
    try:
        yield
    # redis-py lets an OSError through when a connection that it has just made anew is closed again: a master that dies.
    except (exceptions.BusyLoadingError, exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "Redis cannot be reached: try again") from error
    except RuntimeError as error:
        if _CLOSED not in str(error):
            raise
        raise FedmeshError(Code.STORE_UNAVAILABLE, "Redis cannot be reached: try again") from error
    except exceptions.ResponseError as error:
        if _demoted(error):
            raise FedmeshError(Code.STORE_UNAVAILABLE, "this Redis is the master no more: try again") from error
        if _FULL.search(str(error)):
            raise FedmeshError(Code.STORE_FULL, "Redis takes no writes now: free disk or memory") from error
        raise


def _demoted(error: exceptions.ResponseError) -> bool:
    """Whether a server refused a write because it is no master: redis-py knows it by the first word, and takes that."""
    return isinstance(error, exceptions.ReadOnlyError) or _DEMOTED.search(str(error)) is not None


async def redis_ready(client: aioredis.Redis) -> bool:
    """True when Redis answers."""
    try:
        async with redis_errors():
            return bool(await client.ping())
    except (FedmeshError, exceptions.RedisError):
        return False


class Scripts:
    """The Lua scripts of a folder, called by name; each is one atomic transition."""

    def __init__(self, client: aioredis.Redis, folder: Path) -> None:
        self._client = client
        self._scripts = {
            path.stem: client.register_script(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.lua"))
        }

    async def run(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        """Run a script.

        Raises: FedmeshError(STORE_UNAVAILABLE | STORE_FULL); redis ResponseError for a fault in the script.
        """
        async with redis_errors():
            try:
                return await self._scripts[name](keys=keys, args=arguments)
            except exceptions.ResponseError as error:
                if _demoted(error):
                    # redis-py leaves a master that was demoted when a command says so, but not when a script does.
                    await self._client.connection_pool.disconnect(inuse_connections=False)
                raise
