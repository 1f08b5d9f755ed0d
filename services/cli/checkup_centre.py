"""Checks of a service from outside, by the certificate of one that calls it: reachable, and of which version."""

from typing import Final

import grpc
from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import (
    budget_pb2,
    enrolment_pb2,
    membership_pb2,
    performance_pb2,
    promotion_pb2,
    registry_pb2,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli.findings import Finding, Level
from services.common.config import TlsConfig
from services.common.errors import FedmeshError
from services.common.grpc.client import MeshChannel
from services.deployment.check import check_service
from services.deployment.config import CheckConfig, CheckedService

_TIMEOUT_S: Final = 5.0
# What this release calls on each service. A server answers for the health of those that it has, so that an older
# release is told from a newer one.
_SERVED: Final = {
    "registry": [
        registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name,
        promotion_pb2.DESCRIPTOR.services_by_name["PromotionService"].full_name,
        performance_pb2.DESCRIPTOR.services_by_name["PerformanceService"].full_name,
        budget_pb2.DESCRIPTOR.services_by_name["BudgetService"].full_name,
        membership_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,
        enrolment_pb2.DESCRIPTOR.services_by_name["CredentialService"].full_name,
    ],
    "coordinator": [coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name],
    "aggregator": [aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"].full_name],
    "audit": [audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name],
}


async def check_reach(
    part: str, service: str, target: str, tls: TlsConfig, server_name: str | None = None
) -> list[Finding]:
    """Whether `part` reaches a service over mutual TLS, and whether that serves what this release calls.

    server_name: what the service's certificate must be for; the target's host by default.
    """
    what = f"reaches {service}"
    checked = CheckedService(target=target, service="", server_name=server_name)
    try:
        await check_service(CheckConfig(tls=tls, services={service: checked}, patience_s=0), checked)
        missing = await _missing(service, checked, tls)
    except FedmeshError as error:
        todo = (
            f"does {service} run at {target}, do name, port and firewall let {part} through, and do both trust the "
            "same authority? Its log says more; docs/runbooks/FedmeshServiceDown.md"
        )
        return [Finding(Level.FAIL, part, what, f"{target}: {error.message}", todo)]
    if missing:
        seen = f"{target} does not serve {', '.join(missing)}"
        return [Finding(Level.WARN, part, what, seen, f"{service} is of an older release: upgrade the centre first")]
    seen = f"{target} serves this release's calls over mutual TLS, and refuses callers without a certificate"
    return [Finding(Level.OK, part, what, seen)]


async def _missing(service: str, checked: CheckedService, tls: TlsConfig) -> list[str]:
    missing = []
    async with MeshChannel(checked.target, tls, server_name=checked.server_name) as channel:
        stub = channel.stub(health_pb2_grpc.HealthStub)
        for name in _SERVED[service]:
            try:
                await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    continue
                missing.append(name)
    return missing
