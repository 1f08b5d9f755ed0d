"""The check that `helm test` runs, against real servers."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.config import ServerConfig
from services.common.errors import FedmeshError
from services.common.grpc.server import Endpoint, MeshServer
from services.deployment.check import check_services
from services.deployment.config import CheckConfig, CheckedService
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port

NAME = "fedmesh.audit.v1.AuditService"


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return create_ca(tmp_path / "ca", "test.local")


@pytest.fixture
async def server(ca: CertificateAuthority) -> AsyncIterator[MeshServer]:
    config = ServerConfig(listen=f"127.0.0.1:{free_port()}", tls=ca.issue_service("audit"), drain_s=0)
    endpoint = Endpoint(
        audit_pb2.DESCRIPTOR.services_by_name["AuditService"],
        audit_pb2_grpc.add_AuditServiceServicer_to_server,
        audit_pb2_grpc.AuditServiceServicer(),
    )
    made = MeshServer(config, [endpoint])
    await made.start()
    yield made
    await made.stop()


def settings(ca: CertificateAuthority, port: int) -> CheckConfig:
    checked = CheckedService(target=f"dns:///localhost:{port}", service=NAME)
    return CheckConfig(tls=ca.issue_service("check"), services={"audit": checked}, patience_s=0)


async def test_a_server_that_serves_is_in_order(ca: CertificateAuthority, server: MeshServer) -> None:
    lines: list[str] = []
    await check_services(settings(ca, server.port), lines.append)
    assert lines[0].startswith("OK     audit at dns:///localhost:")


async def test_a_server_that_does_not_serve_is_named(ca: CertificateAuthority, server: MeshServer) -> None:
    await server.set_serving(False)
    lines: list[str] = []
    with pytest.raises(FedmeshError, match="not in order: audit"):
        await check_services(settings(ca, server.port), lines.append)
    assert "answers that it does not serve" in lines[0]


async def test_nothing_there_is_named(ca: CertificateAuthority) -> None:
    lines: list[str] = []
    with pytest.raises(FedmeshError, match="not in order: audit"):
        await check_services(settings(ca, free_port()), lines.append)
    assert lines[0].startswith("FAILED audit")


async def test_a_server_that_lets_strangers_in_is_found_out(ca: CertificateAuthority) -> None:
    tls = ca.issue_service("audit")
    open_server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set(NAME, health_pb2.HealthCheckResponse.SERVING)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, open_server)
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
    port = open_server.add_secure_port("127.0.0.1:0", credentials)
    await open_server.start()
    lines: list[str] = []
    with pytest.raises(FedmeshError, match="not in order"):
        await check_services(settings(ca, port), lines.append)
    await open_server.stop(0)
    assert "answers callers without a certificate" in lines[0]
