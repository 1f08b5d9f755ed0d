"""The real process: `python -m services.audit`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from services.common.config import PostgresConfig
from services.embedded.processes import free_port
from services.transparency.checkpoint import generate_key

from .conftest import CONSORTIUM, Replica, World, event


def write_config(folder: Path, world: World, port: int, **changes: object) -> Path:
    database: PostgresConfig = world.postgres.config("audit_service")
    settings: dict[str, object] = {
        "server": {
            "listen": f"127.0.0.1:{port}",
            "tls": world.server_tls.model_dump(mode="json"),
            "drain_s": 1,
        },
        "postgres": database.model_dump(mode="json"),
        # Nobody listens there: the service does not wait for it.
        "registry": {"target": f"127.0.0.1:{free_port()}"},
        "signing_key": str(world.key_file),
    }
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def start(config: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "services.audit", "--config", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())


def wait_listening(port: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


async def test_the_process_serves_and_stops_when_told_to(world: World, tmp_path: Path) -> None:
    port = free_port()
    process = start(write_config(tmp_path, world, port))
    try:
        wait_listening(port, process)
        async with world.replica() as other:
            served = Replica(f"127.0.0.1:{port}", other.log, other.verifier)
            async with world.client(served) as coordinator:
                assert (await coordinator.append(event())).placements[0].index == 0
            async with world.client(other) as coordinator:
                assert (await coordinator.append(event())).placements[0].index == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_configuration_is_checked(world: World, tmp_path: Path) -> None:
    config = write_config(tmp_path, world, free_port())
    process = start(config, "--check-config")
    assert "is OK" in process.communicate(timeout=30)[0]
    assert process.returncode == 0


@pytest.mark.parametrize("fault", ["foreign key", "unknown setting", "open key file"])
def test_a_wrong_configuration_ends_the_process(world: World, tmp_path: Path, fault: str) -> None:
    changes: dict[str, object] = {}
    if fault == "foreign key":
        generate_key(tmp_path / "foreign.key", "elsewhere.test/audit")
        changes["signing_key"] = str(tmp_path / "foreign.key")
    elif fault == "unknown setting":
        changes["sining_key"] = "x"
    else:
        world.key_file.chmod(0o644)
    process = start(write_config(tmp_path, world, free_port(), **changes))
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 78
    assert CONSORTIUM in errors if fault == "foreign key" else errors


def test_a_log_of_another_key_ends_the_process(world: World, tmp_path: Path) -> None:
    async def fill() -> None:
        async with world.replica() as replica, world.client(replica) as coordinator:
            await coordinator.append(event())

    asyncio.run(fill())
    world.key_file.unlink()
    generate_key(world.key_file, f"{CONSORTIUM}/audit")
    process = start(write_config(tmp_path, world, free_port()))
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "not signed by" in errors
