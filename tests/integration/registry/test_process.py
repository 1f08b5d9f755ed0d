"""The registry as a process beside the real audit service: start, health, outages, orderly end."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import yaml
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1 import registry_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.audit.store import MIGRATIONS as AUDIT_MIGRATIONS
from services.common.config import PostgresConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.common.migrations import migrate
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port
from services.registry.store import MIGRATIONS
from services.transparency.checkpoint import generate_key
from tests.integration.registry.harness import CONSORTIUM
from tests.support.stores import PostgresDatabase


class Processes:
    """The two services in a folder, started with configuration files as in production."""

    def __init__(self, folder: Path, database: PostgresDatabase) -> None:
        self.folder = folder
        self.ca: CertificateAuthority = create_ca(folder / "ca", CONSORTIUM)
        self.ports = {name: free_port() for name in ("audit", "registry", "probe", "metrics")}
        key = folder / "log.key"
        generate_key(key, f"{CONSORTIUM}/audit")
        audit = {
            "server": self.server("audit"),
            "registry": {"target": f"127.0.0.1:{self.ports['registry']}"},
            "signing_key": str(key),
        }
        self.write("audit", audit, database.config("audit_service"))
        server = self.server("registry") | {
            "health_listen": f"127.0.0.1:{self.ports['probe']}",
            "metrics_listen": f"127.0.0.1:{self.ports['metrics']}",
        }
        settings: dict[str, Any] = {"server": server, "audit": {"target": f"127.0.0.1:{self.ports['audit']}"}}
        self.write("registry", settings, database.config("registry_service"))

    def server(self, name: str) -> dict[str, Any]:
        tls: TlsConfig = self.ca.issue_service(name)
        files = {key: str(value) for key, value in tls.model_dump().items()}
        return {"listen": f"127.0.0.1:{self.ports[name]}", "tls": files, "drain_s": 2}

    def write(self, name: str, settings: dict[str, Any], store: PostgresConfig) -> None:
        postgres = {"dsn": store.dsn, "password_file": str(store.password_file)}
        self.path(name).write_text(yaml.safe_dump(settings | {"postgres": postgres}))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", f"services.{name}", "--config", str(self.path(name))]
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield child
        finally:
            child.kill()
            child.wait()

    def serving(self) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{self.ports['probe']}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service="fedmesh.registry.v1.RegistryService"), timeout=2
                )
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    ending = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ending, "the condition never held"
        time.sleep(0.1)


async def until_answer(processes: Processes, hospital: str, wanted: Code | None) -> Code | None:
    """Ask the audit log as a hospital until the answer is this error, or none."""
    target = f"127.0.0.1:{processes.ports['audit']}"
    ending = time.monotonic() + 90
    async with MeshChannel(target, processes.ca.issue_hospital(hospital)) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        while True:
            found: Code | None = None
            try:
                await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest())
            except FedmeshError as error:
                found = error.code
            if found is wanted:
                return found
            assert time.monotonic() < ending, f"the audit log never said {wanted} to {hospital}, but {found}"
            await asyncio.sleep(0.1)


@pytest.fixture
def processes(postgres: PostgresDatabase, tmp_path: Path) -> Processes:
    migrate(postgres.config("registry_migrator"), "registry", MIGRATIONS)
    migrate(postgres.config("audit_migrator"), "audit", AUDIT_MIGRATIONS)
    return Processes(tmp_path, postgres)


async def test_the_registry_serves_relays_survives_and_ends_in_order(
    processes: Processes, postgres: PostgresDatabase
) -> None:
    with processes.running("registry") as registry:
        wait(processes.serving)
        async with MeshChannel(
            f"127.0.0.1:{processes.ports['registry']}", processes.ca.issue_operator("alice")
        ) as channel:
            stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)

            async def register(name: str) -> None:
                request = pb.RegisterHospitalRequest(request_id=new_id(), hospital_id=name)
                await call(stub.RegisterHospital, request, patience_s=20)

            def placed() -> list[int | None]:
                with psycopg.connect(postgres.dsn()) as connection:
                    return [row[0] for row in connection.execute("select log_index from registry.outbox order by seq")]

            await register("north")
            assert placed() == [None]
            with processes.running("audit"):
                wait(lambda: placed() == [0])
                postgres.stop()
                wait(lambda: not processes.serving())
                postgres.start()
                wait(processes.serving)
                await register("south")
                wait(lambda: placed() == [0, 1])
            await register("west")
            assert placed() == [0, 1, None]
            with processes.running("audit"):
                wait(lambda: placed() == [0, 1, 2])
                assert await until_answer(processes, "north", None) is None
                status = pb.SetHospitalStatusRequest(
                    request_id=new_id(), hospital_id="north", status=pb.HOSPITAL_STATUS_SUSPENDED, reason="why"
                )
                await call(stub.SetHospitalStatus, status, patience_s=20)
                await until_answer(processes, "north", Code.PERMISSION_DENIED)
                assert await until_answer(processes, "south", None) is None
        registry.send_signal(signal.SIGTERM)
        assert registry.wait(20) == 0


def run(processes: Processes, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.registry", "--config", str(processes.path("registry")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_wrong_configuration_is_told_before_anything_runs(processes: Processes) -> None:
    assert run(processes, "--check-config").returncode == 0
    settings = yaml.safe_load(processes.path("registry").read_text())
    processes.path("registry").write_text(yaml.safe_dump(settings | {"blobs": {"max_byte": 1}}))
    outcome = run(processes, "--check-config")
    assert outcome.returncode == 78
    assert "blobs.max_byte" in outcome.stderr
    settings["server"]["tls"]["key"] = str(processes.folder / "none.key")
    processes.path("registry").write_text(yaml.safe_dump(settings))
    outcome = run(processes, "--check-config")
    assert outcome.returncode == 78
    assert "none.key" in outcome.stderr


def test_a_schema_of_another_release_is_refused(processes: Processes, postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("update registry._yoyo_migration set migration_id = '9999_future'")
    outcome = run(processes)
    assert outcome.returncode == 1
    assert "0001_registry" in outcome.stderr
