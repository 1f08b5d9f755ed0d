"""`fedmesh up`, `status`, `down`: a stack that stays, and its data with it."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fedmesh.registry.v1 import registry_pb2

from services.cli.mesh import stub
from services.common.grpc.client import call
from services.common.ids import new_id
from services.embedded.stack import Part, Stack
from tests.support.command import FEDMESH

HOSPITAL = "hospital-07"
pytestmark = pytest.mark.timeout(400)


def fedmesh(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*FEDMESH, *arguments, "--dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def parts(folder: Path) -> dict[str, Part]:
    return {part.name: part for part in Stack(folder).status()}


def listening(port: int) -> socket.socket:
    """A listener on the port of a process that was just killed: the last of its threads may still hold it a while."""
    for _ in range(100):
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            time.sleep(0.1)
    return socket.create_server(("127.0.0.1", port))


async def register(folder: Path) -> None:
    async with stub(Stack(folder), "registry") as registry:
        request = registry_pb2.RegisterHospitalRequest(
            request_id=new_id(), hospital_id=HOSPITAL, display_name="Seventh"
        )
        await call(registry.RegisterHospital, request, patience_s=30)


def five_free_ports() -> int:
    """The first of five ports in a row that nobody listens on."""
    taken = {connection.laddr.port for connection in psutil.net_connections("tcp") if connection.laddr}
    return next(port for port in range(21_000, 60_000, 10) if not taken & set(range(port, port + 5)))


def test_a_stack_stays_and_comes_back_with_its_data(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    port = str(five_free_ports())
    missing = fedmesh(folder, "status")
    assert (missing.returncode, "fedmesh up" in missing.stderr) == (1, True)
    try:
        started = fedmesh(folder, "up", "--port", port)
        assert started.returncode == 0, started.stderr
        assert fedmesh(folder, "status").returncode == 0
        running = parts(folder)
        assert all(part.running for part in running.values())
        assert fedmesh(folder, "up", "--port", port).returncode == 0
        assert parts(folder) == running, "what runs is left alone"
        asyncio.run(register(folder))

        audit = running["audit"]
        assert audit.pid is not None
        os.kill(audit.pid, signal.SIGKILL)
        while parts(folder)["audit"].running:
            time.sleep(0.1)
        with listening(int(audit.address.rsplit(":", 1)[1])):
            refused = fedmesh(folder, "up", "--port", port)
        assert refused.returncode == 1
        assert "stop what uses that port" in refused.stderr
        others = {name: part for name, part in parts(folder).items() if name != "audit"}
        assert others == {name: part for name, part in running.items() if name != "audit"}, "it stops nothing that ran"
        assert fedmesh(folder, "status").returncode == 3

        assert fedmesh(folder, "down").returncode == 0
        assert not any(part.running for part in parts(folder).values())
        assert fedmesh(folder, "up", "--port", port).returncode == 0
        listed = fedmesh(folder, "hospitals").stdout
        assert HOSPITAL in listed
    finally:
        Stack(folder).stop()
