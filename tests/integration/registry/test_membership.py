"""Who may take part is decided by two people; who may not, by one."""

from datetime import timedelta
from typing import Any

from fedmesh.registry.v1 import enrolment_pb2, enrolment_pb2_grpc
from fedmesh.registry.v1 import membership_pb2 as mb
from fedmesh.registry.v1 import registry_pb2 as pb

from services.cli.tokens import Token
from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from tests.integration.registry.harness import Registry, code, refused

HOUR_S = 3600


async def status(registry: Registry) -> Any:
    listed = await call(registry.operator().ListHospitals, pb.ListHospitalsRequest())
    return listed.hospitals[0].status


def token() -> dict[str, Any]:
    return {"token_sha256": Token.generate("north").sha256, "valid_s": HOUR_S}


async def test_a_proposal_changes_nothing_before_another_person_approves_it(registry: Registry) -> None:
    await registry.register("north")
    await registry.suspend("north")
    change = await registry.propose("reinstate", "north")
    assert await status(registry) == pb.HOSPITAL_STATUS_SUSPENDED
    own = await refused(registry.approve(change, by="alice"))
    assert (own.code, "by another operator" in own.message) == (Code.PERMISSION_DENIED, True)
    assert await status(registry) == pb.HOSPITAL_STATUS_SUSPENDED
    approved = await registry.approve(change)
    assert (approved.proposed_by[-5:], approved.approved_by[-3:]) == ("alice", "bob")
    assert await status(registry) == pb.HOSPITAL_STATUS_ACTIVE
    again = await refused(registry.approve(change, by="carol"))
    assert (again.code, "approved already" in again.message) == (Code.WRONG_STATE, True)
    await registry.decide("remove", "north")
    assert await status(registry) == pb.HOSPITAL_STATUS_REMOVED
    await registry.drained()
    told = [(event.type, event.actor.rsplit("/", 1)[1]) for event in registry.audit.events if event.type[0] in "hm"]
    assert told == [
        ("hospital.registered", "alice"),
        ("hospital.status_changed", "alice"),
        ("membership.proposed", "alice"),
        ("membership.approved", "bob"),
        ("hospital.status_changed", "bob"),
        ("membership.proposed", "alice"),
        ("membership.approved", "bob"),
        ("hospital.status_changed", "bob"),
    ]


async def test_an_approval_counts_for_the_standing_that_was_proposed_on_and_not_for_ever(registry: Registry) -> None:
    await registry.register("north")
    await registry.suspend("north")
    stale, old = await registry.propose("reinstate", "north"), await registry.propose("remove", "north")
    await registry.decide("reinstate", "north")
    await registry.suspend("north")
    error = await refused(registry.approve(stale))
    assert (error.code, "decided anew after this was proposed" in error.message) == (Code.WRONG_STATE, True)
    late = await registry.propose("reinstate", "north")
    registry.sql(
        "update registry.membership_changes set proposed_at = proposed_at - interval '8 days',"
        " expires_at = expires_at - interval '8 days' where change_id = %s",
        late,
    )
    error = await refused(registry.approve(late))
    assert (error.code, "could be approved until" in error.message) == (Code.WRONG_STATE, True)
    assert await status(registry) == pb.HOSPITAL_STATUS_SUSPENDED
    await registry.decide("remove", "north")
    assert await code(registry.approve(old)) is Code.WRONG_STATE
    assert await code(registry.propose("reinstate", "north")) is Code.WRONG_STATE
    assert await code(registry.propose("remove", "nobody")) is Code.NOT_FOUND
    assert await code(registry.approve(new_id())) is Code.NOT_FOUND


async def test_a_suspension_anew_ends_what_was_proposed_before_it(registry: Registry) -> None:
    await registry.register("north")
    await registry.suspend("north")
    stale = await registry.propose("reinstate", "north")
    await registry.suspend("north")
    error = await refused(registry.approve(stale))
    assert (error.code, "decided anew after this was proposed" in error.message) == (Code.WRONG_STATE, True)
    assert await status(registry) == pb.HOSPITAL_STATUS_SUSPENDED
    fresh = await registry.propose("reinstate", "north")
    listed = await call(registry.membership().ListMembershipChanges, mb.ListMembershipChangesRequest())
    assert [(item.change_id, item.overtaken) for item in listed.changes] == [(fresh, False), (stale, True)]
    await registry.approve(fresh)
    assert await status(registry) == pb.HOSPITAL_STATUS_ACTIVE
    # What was approved stays approved, whatever is decided later.
    await registry.suspend("north")
    listed = await call(registry.membership().ListMembershipChanges, mb.ListMembershipChangesRequest())
    assert [item.overtaken for item in listed.changes] == [False, True]


async def test_an_invitation_counts_from_its_approval(registry: Registry) -> None:
    await registry.register("north")
    facts = token()
    change = await registry.propose("invite", "north", **facts)
    assert registry.sql("select * from registry.invitations") == []
    approved = await registry.approve(change)
    assert approved.token_expires_at.ToDatetime() - approved.approved_at.ToDatetime() == timedelta(seconds=HOUR_S)
    assert registry.sql("select token_sha256, issued_by like %s from registry.invitations", "%/bob") == [
        (facts["token_sha256"], True)
    ]
    assert await code(registry.propose("invite", "north", **facts)) is Code.ALREADY_EXISTS
    assert await code(registry.propose("invite", "north", **(token() | {"valid_s": 59}))) is Code.INVALID_ARGUMENT
    assert await code(registry.propose("invite", "north")) is Code.INVALID_ARGUMENT
    assert await code(registry.propose("remove", "north", **token())) is Code.INVALID_ARGUMENT
    listed = await call(registry.membership().ListMembershipChanges, mb.ListMembershipChangesRequest())
    assert [item.change_id for item in listed.changes] == [change]


async def test_a_client_of_before_hears_that_it_takes_two(registry: Registry) -> None:
    await registry.register("north")
    credentials = registry.stub(registry._tls("operator", "alice"), enrolment_pb2_grpc.CredentialServiceStub)
    request = enrolment_pb2.InviteHospitalRequest(request_id=new_id(), hospital_id="north", **token())
    error = await refused(call(credentials.InviteHospital, request))
    assert (error.code, "takes two people" in error.message) == (Code.PERMISSION_DENIED, True)
    assert registry.sql("select * from registry.invitations") == []


async def test_a_repeated_request_is_answered_as_before(registry: Registry) -> None:
    await registry.register("north")
    kind = mb.MEMBERSHIP_CHANGE_KIND_REMOVE
    proposing = mb.ProposeMembershipChangeRequest(request_id=new_id(), kind=kind, hospital_id="north", reason="why")
    first = await call(registry.membership().ProposeMembershipChange, proposing)
    assert await call(registry.membership().ProposeMembershipChange, proposing) == first
    approving = mb.ApproveMembershipChangeRequest(request_id=new_id(), change_id=first.change.change_id)
    done = await call(registry.membership("bob").ApproveMembershipChange, approving)
    assert await call(registry.membership("bob").ApproveMembershipChange, approving) == done
    assert await code(call(registry.membership("carol").ApproveMembershipChange, approving)) is Code.REQUEST_ID_REUSED
