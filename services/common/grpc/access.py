"""The access policy, read from the `fedmesh.common.v1.access` option that stands beside each method in its proto."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedmesh.common.v1 import access_pb2
from google.protobuf.descriptor import ServiceDescriptor

from services.common.config import RoleName
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

_ROLES: Final[dict[int, RoleName]] = {
    access_pb2.ROLE_RESEARCHER: "researcher",
    access_pb2.ROLE_HOSPITAL_ADMIN: "hospital-admin",
    access_pb2.ROLE_CONSORTIUM_ADMIN: "consortium-admin",
    access_pb2.ROLE_AUDITOR: "auditor",
    access_pb2.ROLE_SRE: "sre",
}


@dataclass(frozen=True)
class Rule:
    """Who may call one method.

    roles: of which a person needs one; none means that nobody has to sign in. mfa: a second factor is needed.
    second_person: enforced where the first person is known, in the use case.
    """

    allow: frozenset[tuple[Kind, str | None]]
    objective: bool = False
    roles: frozenset[RoleName] = frozenset()
    mfa: bool = False
    second_person: bool = False

    def permits(self, caller: Identity) -> bool:
        return (caller.kind, None) in self.allow or (caller.kind, caller.name) in self.allow


# Standard services that every server carries. Any certificate of the consortium may ask for health.
_ANYONE: Final = Rule(frozenset((kind, None) for kind in Kind))
_OPERATORS: Final = Rule(frozenset({(Kind.OPERATOR, None)}), roles=frozenset({"sre", "consortium-admin"}))
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

    Raises: FedmeshError(CONFIG_INVALID) when a method allows nobody, or operators without a role: it must not start.
    """
    policy = dict(STANDARD)
    for service in services:
        for method in service.methods:
            access = method.GetOptions().Extensions[access_pb2.access]
            policy[f"/{service.full_name}/{method.name}"] = _rule(method.full_name, access)
    return policy


def _rule(name: str, access: access_pb2.Access) -> Rule:
    unknown = [caller for caller in access.allow if caller not in _CALLERS]
    if unknown or not access.allow:
        raise FedmeshError(Code.CONFIG_INVALID, f"{name} has no usable access policy in its proto")
    if (access_pb2.CALLER_OPERATOR in access.allow) != bool(access.roles) or not set(access.roles) <= set(_ROLES):
        raise FedmeshError(
            Code.CONFIG_INVALID, f"{name} must list roles in its proto if operators call it, and only then"
        )
    if (access.mfa or access.second_person) and not access.roles:
        raise FedmeshError(Code.CONFIG_INVALID, f"{name} asks for a second factor or person, but no person may call it")
    return Rule(
        frozenset(_CALLERS[caller] for caller in access.allow),
        access.objective,
        frozenset(_ROLES[role] for role in access.roles),
        access.mfa,
        access.second_person,
    )
