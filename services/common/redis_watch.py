"""How full and how busy Redis is, as metrics: this process's connections, and what the server says of itself."""

import asyncio
from typing import Any, Final

import redis.asyncio as aioredis
from prometheus_client import Gauge
from redis import exceptions

from services.common.errors import FedmeshError
from services.common.redis import redis_errors
from services.common.telemetry import get_logger

log = get_logger(__name__)

_INTERVAL_S: Final = 5.0
UP: Final = Gauge("fedmesh_redis_up", "1 while Redis answers")
_SECONDS: Final = Gauge("fedmesh_redis_ping_seconds", "Time that Redis took to answer last")
_IN_USE: Final = Gauge("fedmesh_redis_pool_in_use", "Connections of this process that are in use")
_POOL_MAX: Final = Gauge("fedmesh_redis_pool_max", "Most connections that this process may open")
_MEMORY: Final = Gauge("fedmesh_redis_memory_used_bytes", "Memory that Redis uses for data")
_MEMORY_MAX: Final = Gauge("fedmesh_redis_memory_max_bytes", "Memory above which Redis refuses writes; 0: no limit")
_CLIENTS: Final = Gauge("fedmesh_redis_clients", "Connections that Redis has")
_CLIENTS_MAX: Final = Gauge("fedmesh_redis_clients_max", "Most connections that Redis takes")
_REPLICAS: Final = Gauge("fedmesh_redis_replicas", "Replicas that are connected to the master")
_LAG: Final = Gauge("fedmesh_redis_replica_lag_seconds", "Longest silence of a connected replica")
_AOF: Final = Gauge("fedmesh_redis_append_only_ok", "1 while Redis writes its append-only file, or has none")
# What `INFO` calls them.
_FIELDS: Final = {
    "used_memory": _MEMORY,
    "maxmemory": _MEMORY_MAX,
    "connected_clients": _CLIENTS,
    "maxclients": _CLIENTS_MAX,
    "connected_slaves": _REPLICAS,
}


class RedisWatch:
    """Looks every few seconds. A Redis whose user may not ask for `INFO` shows whether it answers, and no more."""

    def __init__(self, client: aioredis.Redis) -> None:
        self._client = client

    async def run(self) -> None:
        """Look until cancelled. A Redis that is away ends nothing."""
        while True:
            await self.look()
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Measure once."""
        pool = self._client.connection_pool
        _POOL_MAX.set(pool.max_connections)
        _IN_USE.set(len(pool._in_use_connections))
        started = asyncio.get_running_loop().time()
        try:
            async with redis_errors():
                await self._client.ping()
        except (FedmeshError, exceptions.RedisError):
            UP.set(0)
            return
        UP.set(1)
        _SECONDS.set(asyncio.get_running_loop().time() - started)
        try:
            async with redis_errors():
                self._show(await self._client.info())
        except exceptions.NoPermissionError:
            log.debug("redis_tells_nothing", reason="the ACL user may not ask for INFO")
        except (FedmeshError, exceptions.RedisError) as error:
            log.info("redis_not_measured", reason=str(error))

    def _show(self, info: dict[str, Any]) -> None:
        for field, gauge in _FIELDS.items():
            if field in info:
                gauge.set(info[field])
        replicas = [value for name, value in info.items() if name.startswith("slave") and isinstance(value, dict)]
        _LAG.set(max((float(replica.get("lag", 0)) for replica in replicas), default=0.0))
        _AOF.set(info.get("aof_last_write_status", "ok") == "ok")
