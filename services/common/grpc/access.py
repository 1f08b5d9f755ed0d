"""The access policy, read from the `fedmesh.common.v1.access` option that stands beside each method in its proto."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedmesh.common.v1 import access_pb2
from google.protobuf.descriptor import ServiceDescriptor

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind

_CALLERS: Final[dict[int, tuple[Kind, str | None]]] = {
    access_pb2.CALLER_HOSPITAL: (Kind.HOSPITAL, None),
    access_pb2.CALLER_OPERATOR: (Kind.OPERATOR, None),
    access_pb2.CALLER_REGISTRY: (Kind.SERVICE, "registry"),
    access_pb2.CALLER_COORDINATOR: (Kind.SERVICE, "coordinator"),
    access_pb2.CALLER_AGGREGATOR: (Kind.SERVICE, "aggregator"),
    access_pb2.CALLER_AUDIT: (Kind.SERVICE, "audit"),
}


@dataclass(frozen=True)
class Rule:
    """Who may call one method."""

    allow: frozenset[tuple[Kind, str | None]]
    objective: bool = False

    def permits(self, caller: Identity) -> bool:
        return (caller.kind, None) in self.allow or (caller.kind, caller.name) in self.allow


# Standard services that every server carries. Any certificate of the consortium may ask for health.
_ANYONE: Final = Rule(frozenset((kind, None) for kind in Kind))
_OPERATORS: Final = Rule(frozenset({(Kind.OPERATOR, None)}))
STANDARD: Final[dict[str, Rule]] = {
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OPERATORS,
}


def load_stranger_methods(service: ServiceDescriptor) -> frozenset[str]:
    """Full names of the methods of a service that is for callers without a certificate.

    Raises: FedmeshError(CONFIG_INVALID) when a method is for anybody else: it would be open to everybody.
    """
    for method in service.methods:
        if list(method.GetOptions().Extensions[access_pb2.access].allow) != [access_pb2.CALLER_STRANGER]:
            raise FedmeshError(Code.CONFIG_INVALID, f"{method.full_name} is not for strangers by its proto")
    return frozenset(f"/{service.full_name}/{method.name}" for method in service.methods)


def load_policy(services: Iterable[ServiceDescriptor]) -> dict[str, Rule]:
    """The policy of some services, by full method name (`/package.Service/Method`).

    Raises: FedmeshError(CONFIG_INVALID) when a method allows nobody: such a server must not start.
    """
    policy = dict(STANDARD)
    for service in services:
        for method in service.methods:
            access = method.GetOptions().Extensions[access_pb2.access]
            unknown = [caller for caller in access.allow if caller not in _CALLERS]
            if unknown or not access.allow:
                raise FedmeshError(Code.CONFIG_INVALID, f"{method.full_name} has no usable access policy in its proto")
            rule = Rule(frozenset(_CALLERS[caller] for caller in access.allow), access.objective)
            policy[f"/{service.full_name}/{method.name}"] = rule
    return policy
