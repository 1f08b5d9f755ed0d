"""The access policy beside the protos, and who a certificate says somebody is."""

import pytest
from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.common.v1 import access_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import enrolment_pb2, membership_pb2, registry_pb2
from google.protobuf import descriptor_pb2, descriptor_pool

from services.common.errors import Code, FedmeshError
from services.common.grpc.access import load_policy
from services.common.identity import Identity, Kind, parse_identity, require_hospital

SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (registry_pb2, "RegistryService"),
        (enrolment_pb2, "CredentialService"),
        (membership_pb2, "MembershipService"),
        (coordinator_pb2, "CoordinatorService"),
        (aggregator_pb2, "AggregatorService"),
        (audit_pb2, "AuditService"),
    )
]
HOSPITAL = Identity("c.local", Kind.HOSPITAL, "h-1")
OPERATOR = Identity("c.local", Kind.OPERATOR, "o-1")
COORDINATOR = Identity("c.local", Kind.SERVICE, "coordinator")


def test_every_method_of_every_service_has_a_policy() -> None:
    policy = load_policy(SERVICES)
    for service in SERVICES:
        for method in service.methods:
            assert f"/{service.full_name}/{method.name}" in policy


@pytest.mark.parametrize(
    ("method", "caller", "allowed"),
    [
        ("/fedmesh.aggregator.v1.AggregatorService/Upload", HOSPITAL, True),
        ("/fedmesh.aggregator.v1.AggregatorService/Upload", OPERATOR, False),
        ("/fedmesh.aggregator.v1.AggregatorService/CloseSum", HOSPITAL, False),
        ("/fedmesh.aggregator.v1.AggregatorService/CloseSum", COORDINATOR, True),
        ("/fedmesh.registry.v1.RegistryService/CreateJob", HOSPITAL, False),
        ("/fedmesh.registry.v1.RegistryService/CommitRound", OPERATOR, False),
        ("/fedmesh.registry.v1.MembershipService/ProposeMembershipChange", HOSPITAL, False),
        ("/fedmesh.registry.v1.CredentialService/RevokeCertificates", HOSPITAL, False),
        ("/fedmesh.registry.v1.CredentialService/RenewCertificate", HOSPITAL, True),
        ("/fedmesh.registry.v1.CredentialService/RenewCertificate", OPERATOR, False),
        ("/fedmesh.audit.v1.AuditService/AppendEvents", HOSPITAL, False),
        ("/fedmesh.audit.v1.AuditService/AppendEvents", OPERATOR, False),
        ("/grpc.health.v1.Health/Check", HOSPITAL, True),
    ],
)
def test_who_may_call_what(method: str, caller: Identity, allowed: bool) -> None:
    assert load_policy(SERVICES)[method].permits(caller) is allowed


def test_a_method_that_allows_nobody_keeps_the_server_from_starting() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="open.proto", package="t", syntax="proto3")
    file.message_type.add(name="M")
    file.service.add(name="S").method.add(name="Open", input_type=".t.M", output_type=".t.M")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    with pytest.raises(FedmeshError, match=r"t\.S\.Open") as caught:
        load_policy([pool.FindServiceByName("t.S")])
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize(
    "uri",
    [
        "https://c.local/hospital/h-1",
        "spiffe://c.local/hospital/",
        "spiffe://c.local/hospital/h-1/extra",
        "spiffe://c.local/robot/h-1",
        "spiffe://c.local/hospital/H 1",
        "spiffe:///hospital/h-1",
    ],
)
def test_other_names_are_no_identity(uri: str) -> None:
    with pytest.raises(FedmeshError) as caught:
        parse_identity(uri)
    assert caught.value.code is Code.UNAUTHENTICATED


def test_identities_round_trip_and_hospitals_speak_for_themselves() -> None:
    assert parse_identity(str(HOSPITAL)) == HOSPITAL
    require_hospital(HOSPITAL, "h-1")
    require_hospital(OPERATOR, "h-2")
    with pytest.raises(FedmeshError) as caught:
        require_hospital(HOSPITAL, "h-2")
    assert caught.value.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize(
    "access",
    [
        access_pb2.Access(allow=[access_pb2.CALLER_OPERATOR]),
        access_pb2.Access(allow=[access_pb2.CALLER_OPERATOR], roles=[access_pb2.ROLE_UNSPECIFIED]),
        access_pb2.Access(allow=[access_pb2.CALLER_HOSPITAL], roles=[access_pb2.ROLE_AUDITOR]),
        access_pb2.Access(allow=[access_pb2.CALLER_HOSPITAL], mfa=True),
    ],
)
def test_a_method_for_operators_without_roles_keeps_the_server_from_starting(access: access_pb2.Access) -> None:
    file = descriptor_pb2.FileDescriptorProto(name="roles.proto", package="t", syntax="proto3")
    file.message_type.add(name="M")
    method = file.service.add(name="S").method.add(name="Do", input_type=".t.M", output_type=".t.M")
    method.options.Extensions[access_pb2.access].CopyFrom(access)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    with pytest.raises(FedmeshError, match=r"t\.S\.Do") as caught:
        load_policy([pool.FindServiceByName("t.S")])
    assert caught.value.code is Code.CONFIG_INVALID


def test_what_decides_for_others_needs_a_second_factor() -> None:
    policy = load_policy(SERVICES)
    sensitive = {method.rsplit("/", 1)[1] for method, rule in policy.items() if rule.mfa}
    assert sensitive >= {"ApprovePlan", "RegisterHospital", "SetHospitalStatus", "PublishRoster"}
    assert sensitive >= {"RevokeCertificates", "ProposeMembershipChange", "ApproveMembershipChange"}
    two = {method.rsplit("/", 1)[1] for method, rule in policy.items() if rule.second_person}
    assert two == {"ApprovePlan", "ApproveMembershipChange"}
