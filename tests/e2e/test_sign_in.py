"""A stack in which people sign in: two of them decide about a hospital, and what was refused stands in the log."""

import asyncio
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedmesh.audit.v1 import audit_pb2

from services.cli import membership, people, session
from services.cli.mesh import stub
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import stream
from services.common.people.device import Client, Device, Invitation
from services.embedded.guard import Guard
from services.embedded.issuer import CLIENT_ID
from services.embedded.stack import ISSUER, SERVICES, Stack
from tests.support.reached import centre_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(590)]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    guard = Guard()
    made = Stack(tmp_path / "stack", guard=guard)
    try:
        made.require_sign_in()
        made.start(["audit", "registry"])
        yield made
    finally:
        made.stop()
        guard.close()


def sign_in(stack: Stack, name: str) -> None:
    """As `fedmesh login` and `curl -d` do; the session is the present one then."""
    client = Client(f"http://{stack.target(ISSUER)}", CLIENT_ID, "openid", "access")
    device = Device(client, lambda _seconds: None)
    invitation = device.invite()
    confirm(invitation, name)
    session.save(client, device.wait(invitation))


def confirm(invitation: Invitation, name: str) -> None:
    """What the person does in a browser."""
    form = urllib.parse.urlencode({"user_code": invitation.code, "user": name}).encode()
    with urllib.request.urlopen(invitation.url, form, timeout=20) as page:
        assert f"Signed in as {name}" in page.read().decode()


def refused(code: Code, words: str, ask: object, *arguments: object, **options: object) -> None:
    assert callable(ask)
    with pytest.raises(FedmeshError, match=words) as caught:
        ask(*arguments, **options)
    assert caught.value.code is code


def test_two_people_sign_in_and_let_a_hospital_in(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    refused(Code.UNAUTHENTICATED, "fedmesh login", membership.register, "north", "", stack.folder)
    sign_in(stack, "arthur")
    refused(Code.PERMISSION_DENIED, "held: auditor", membership.register, "north", "", stack.folder)
    sign_in(stack, "alice")
    membership.register("north", "North", stack.folder)
    membership.invite("north", tmp_path / "token", "1h", "it joins", stack.folder)
    change = capsys.readouterr().out.split()[-1]
    refused(Code.PERMISSION_DENIED, "by another operator", membership.approve, change, stack.folder)
    sign_in(stack, "bob")
    membership.approve(change, stack.folder)
    assert "north may enrol once" in capsys.readouterr().out
    sign_in(stack, "arthur")

    async def told() -> set[tuple[str, str]]:
        async with stub(stack, "audit") as audit:
            request = audit_pb2.ListEntriesRequest()
            leaves = [json.loads(item.leaf) async for item in stream(audit.ListEntries, request, timeout_s=30)]
        return {(leaf["type"], (leaf["body"].get("caller") or leaf["actor"]).rsplit("/", 1)[1]) for leaf in leaves}

    async def until() -> None:
        expected = {("access.refused", name) for name in ("operator", "arthur", "alice")}
        expected |= {("membership.proposed", "alice"), ("membership.approved", "bob"), ("hospital.invited", "bob")}
        async with asyncio.timeout(120):
            while not await told() >= expected:  # noqa: ASYNC110 - the log is elsewhere
                await asyncio.sleep(0.1)

    asyncio.run(until())


def test_people_sign_in_at_the_centre_that_a_file_names(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    targets = {
        name: {"target": stack.target(name) if name in ("audit", "registry") else "127.0.0.1:1"} for name in SERVICES
    }
    issuer = {"issuer": f"http://{stack.target(ISSUER)}", "client_id": CLIENT_ID, "scope": "openid"}
    file = centre_file(tmp_path / "centre.yaml", targets, stack.operator("operator"), sign_in=issuer)
    invite = Device.invite

    def login(name: str) -> None:
        def confirmed(device: Device) -> Invitation:
            invitation = invite(device)
            confirm(invitation, name)
            return invitation

        monkeypatch.setattr(Device, "invite", confirmed)
        people.login(centre=file)

    refused(Code.UNAUTHENTICATED, "fedmesh login", membership.changes, centre=file)
    login("arthur")
    refused(Code.PERMISSION_DENIED, "held: auditor", membership.suspend, "north", "late", centre=file)
    login("alice")
    membership.register("north", "North", centre=file)
    membership.suspend("north", "late", centre=file)
    membership.reinstate("north", "it is back", centre=file)
    change = capsys.readouterr().out.split()[-1]
    refused(Code.PERMISSION_DENIED, "by another operator", membership.approve, change, centre=file)
    login("bob")
    membership.approve(change, centre=file)
    assert "north is active again" in capsys.readouterr().out
