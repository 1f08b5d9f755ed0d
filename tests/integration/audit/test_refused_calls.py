"""Refusals of a process that is killed while the log is away: the next process tells every one of them, once."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedmesh.audit.v1 import audit_pb2 as pb
from fedmesh.audit.v1 import audit_pb2_grpc

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.embedded.processes import free_port

from .conftest import CONSORTIUM, Replica, World, event
from .test_process import start, wait_listening, write_config

TIMES = 3


async def refused(port: int, tls: TlsConfig) -> None:
    """Append as somebody who may not, several times over."""
    async with MeshChannel(f"127.0.0.1:{port}", tls) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        for _ in range(TIMES):
            with pytest.raises(FedmeshError) as caught:
                await call(stub.AppendEvents, pb.AppendEventsRequest(events=[event()]), timeout_s=20)
            assert caught.value.code is Code.PERMISSION_DENIED


async def holds(replica: Replica, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The log's entries of refused calls, once a condition on them is met."""
    async with asyncio.timeout(60):
        while True:
            leaves = [json.loads(leaf) async for _, leaf in replica.log.entries(0, 0)]
            found = [leaf for leaf in leaves if leaf["type"] == "access.refused"]
            if condition(found):
                return found
            await asyncio.sleep(0.05)


def calls(entries: list[dict[str, Any]]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for entry in entries:
        counted[entry["body"]["caller"]] += entry["body"]["count"]
    return counted


async def test_refusals_of_a_killed_process_are_told_once_by_the_next_one(world: World, tmp_path: Path) -> None:
    port = free_port()
    config = write_config(tmp_path, world, port)
    text = config.read_text().replace("server:\n", f"server:\n  refusals: {{directory: {tmp_path / 'refusals'}}}\n")
    config.write_text(text)
    north, south = world.ca.issue_hospital("north"), world.ca.issue_hospital("south")
    first = start(config)
    try:
        wait_listening(port, first)
        world.postgres.stop()
        await refused(port, north)
        await refused(port, south)
        first.send_signal(signal.SIGKILL)
        first.wait()
    finally:
        first.kill()
        first.communicate()
    world.postgres.start()
    async with world.replica() as other:
        assert await holds(other, lambda _: True) == []
        second = start(config)
        try:
            wanted = {f"spiffe://{CONSORTIUM}/hospital/{name}": TIMES for name in ("north", "south")}
            await holds(other, lambda entries: calls(entries) == wanted)
            wait_listening(port, second)
            # Once more after all that it had to tell.
            await refused(port, world.ca.issue_hospital("east"))
            wanted[f"spiffe://{CONSORTIUM}/hospital/east"] = TIMES
            second.send_signal(signal.SIGTERM)
            assert second.wait(15) == 0
            assert calls(await holds(other, lambda _: True)) == wanted
        finally:
            second.kill()
            second.communicate()
