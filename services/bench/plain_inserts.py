"""`python -m services.bench.plain_inserts CONFIG`: what the audit log is compared with, a service that just inserts.

CONFIG: the audit service's file. Server, certificate, gate, messages and role are those of the audit service; but every
event becomes a row by an insert of its own, committed by itself, without tree, checkpoint or proof. A call without
events does nothing, which is what a call costs. Prints its port, and ends with its standard input.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from psycopg_pool import AsyncConnectionPool

from services.audit.config import AuditConfig
from services.bench.bounds import INSERT
from services.common.config import load_config
from services.common.grpc.server import Endpoint, MeshServer
from services.common.postgres import conninfo
from services.common.telemetry import setup_telemetry, shutdown_telemetry


class PlainServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    async def AppendEvents(
        self, request: audit_pb2.AppendEventsRequest, _context: Any
    ) -> audit_pb2.AppendEventsResponse:
        for event in request.events:
            async with self._pool.connection() as connection:
                await connection.execute(INSERT, (event.event_id, event.body_json))
        return audit_pb2.AppendEventsResponse(
            placements=[audit_pb2.Placement(event_id=event.event_id) for event in request.events]
        )


async def serve(config: AuditConfig) -> None:
    """Serve until the standard input ends."""
    setup_telemetry("plain", config.telemetry)
    listen = {"listen": "127.0.0.1:0", "health_listen": None, "metrics_listen": None}
    most = config.postgres.pool_max
    async with AsyncConnectionPool(
        conninfo(config.postgres), min_size=most, max_size=most, kwargs={"autocommit": True}, open=False
    ) as pool:
        endpoint = Endpoint(
            audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
            audit_pb2_grpc.add_AuditServiceServicer_to_server,
            # Nobody calls the other methods.
            PlainServicer(pool),  # type: ignore[abstract]
        )
        server = MeshServer(config.server.model_copy(update=listen), [endpoint], admit=lambda _peer: None)
        await server.start()
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop()
    shutdown_telemetry()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(load_config(AuditConfig, Path(sys.argv[1]))))
