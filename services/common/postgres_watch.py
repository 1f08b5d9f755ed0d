"""How full and how busy PostgreSQL is, as metrics: this process's pool, and what the server says of itself.

Everything asked for is open to every role. What only a monitoring role may see, such as how far standbys lag in bytes,
is for the database's own exporter.
"""

import asyncio
import time
from typing import Any, Final

import psycopg
from prometheus_client import Gauge

from services.common.errors import FedmeshError
from services.common.postgres import Connection, Database
from services.common.telemetry import get_logger

log = get_logger(__name__)

_INTERVAL_S: Final = 5.0
UP: Final = Gauge("fedmesh_postgres_up", "1 while PostgreSQL answers")
_SECONDS: Final = Gauge("fedmesh_postgres_ping_seconds", "Time that a transaction of one statement took last")
_POOL: Final = Gauge("fedmesh_postgres_pool_connections", "Connections of this process by state", ["state"])
_POOL_MAX: Final = Gauge("fedmesh_postgres_pool_max", "Most connections that this process may open")
_WAITING: Final = Gauge("fedmesh_postgres_pool_waiting", "Transactions of this process that wait for a connection")
# Gauges, for the pool counts them itself.
_WAITED: Final = Gauge(
    "fedmesh_postgres_pool_waited_seconds", "Time that transactions of this process have waited for a connection"
)
_FAILED: Final = Gauge("fedmesh_postgres_pool_errors", "Transactions of this process that got no connection")
_CLIENTS: Final = Gauge("fedmesh_postgres_connections", "Connections that the server has, all databases together")
_CLIENTS_MAX: Final = Gauge("fedmesh_postgres_connections_max", "Most connections that the server takes")
_STANDBYS: Final = Gauge("fedmesh_postgres_standbys", "Standbys that stream from the server")
_ARCHIVED: Final = Gauge("fedmesh_postgres_wal_archived", "WAL files that were archived since the statistics began")
_NOT_ARCHIVED: Final = Gauge(
    "fedmesh_postgres_wal_archive_failed", "1 while the newest try to archive a WAL file is one that failed"
)
_SIZE: Final = Gauge("fedmesh_postgres_database_bytes", "Size of the database")

_ASK: Final = """
    select (select sum(numbackends) from pg_stat_database) as clients,
        current_setting('max_connections')::int as clients_max,
        (select count(*) from pg_stat_replication) as standbys,
        archived_count,
        coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) as not_archived,
        pg_database_size(current_database()) as size
    from pg_stat_archiver
"""


class PostgresWatch:
    """Looks every few seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self) -> None:
        """Look until cancelled. A database that is away ends nothing."""
        while True:
            await self.look()
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Measure once."""
        self._show_pool(self._database.pool_stats())
        started = time.perf_counter()
        try:
            seen = await self._database.run_tx("watch", _ask)
        except FedmeshError as error:
            UP.set(0)
            log.info("postgres_not_measured", code=error.code.value, reason=error.message)
            return
        except psycopg.Error as error:
            # It answers, but not this: no reason to end the service, as a loop that fails would.
            log.warning("postgres_tells_nothing", reason=str(error))
            return
        UP.set(1)
        _SECONDS.set(time.perf_counter() - started)
        _CLIENTS.set(seen["clients"])
        _CLIENTS_MAX.set(seen["clients_max"])
        _STANDBYS.set(seen["standbys"])
        _ARCHIVED.set(seen["archived_count"])
        _NOT_ARCHIVED.set(seen["not_archived"])
        _SIZE.set(seen["size"])

    def _show_pool(self, stats: dict[str, int]) -> None:
        # The pool leaves out what is 0.
        size, free = stats.get("pool_size", 0), stats.get("pool_available", 0)
        _POOL.labels("busy").set(size - free)
        _POOL.labels("free").set(free)
        _POOL_MAX.set(stats.get("pool_max", 0))
        _WAITING.set(stats.get("requests_waiting", 0))
        _WAITED.set(stats.get("requests_wait_ms", 0) / 1000)
        _FAILED.set(stats.get("requests_errors", 0))


async def _ask(connection: Connection) -> dict[str, Any]:
    row = await (await connection.execute(_ASK)).fetchone()
    assert row is not None
    return row
