"""The development issuer: a whole sign-in over HTTP, and where it refuses to run."""

import os
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import jwt
import pytest

from services.cli import session
from services.common.errors import Code, FedmeshError
from services.common.people.device import Client, Device
from services.embedded.ca import create_ca
from services.embedded.issuer import AUDIENCE, CLIENT_ID, load, main, prepare
from tests.support.signing_in import TestIssuer, running_issuer


@pytest.fixture
def issuer() -> Iterator[TestIssuer]:
    with running_issuer() as made:
        yield made


def post(url: str, headers: Mapping[str, str] | None = None, /, **form: str) -> str:
    """What `curl -d` would get."""
    request = urllib.request.Request(url, urllib.parse.urlencode(form).encode(), dict(headers or {}))
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def signing_in(issuer: TestIssuer, **form: str) -> Any:
    client = Client(issuer.url, CLIENT_ID, "openid", "access")
    waits: list[float] = []
    device = Device(client, waits.append)
    invitation = device.invite()
    post(invitation.url, user_code=invitation.code.lower(), **form)
    return client, device.wait(invitation)


def test_a_person_signs_in_by_a_page_and_stays_so(
    issuer: TestIssuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    client, tokens = signing_in(issuer, user="rita")
    claims = jwt.decode(tokens.bearer, issuer.key.public_key(), ["RS256"], audience=AUDIENCE, issuer=issuer.url)
    assert (claims["sub"], claims["roles"], claims["amr"]) == ("rita", ["auditor"], ["pwd"])
    session.save(client, tokens)
    assert session.bearer() == tokens.bearer
    renewed = Device(client).refresh(tokens.refresh or "")
    assert jwt.decode(renewed.bearer, options={"verify_signature": False})["auth_time"] == claims["auth_time"]


def test_nobody_signs_in_without_a_decision_and_a_code_counts_once(issuer: TestIssuer) -> None:
    with pytest.raises(FedmeshError, match="refused to sign you in"):
        signing_in(issuer, refuse="yes")
    client = Client(issuer.url, CLIENT_ID, "openid", "access")
    invitation = Device(client).invite()
    token_url, waiting = f"{issuer.url}/token", {"client_id": CLIENT_ID, "device_code": invitation.device_code}
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    with pytest.raises(HTTPError) as caught:
        post(token_url, grant_type=grant, **waiting)
    assert b"authorization_pending" in caught.value.read()
    for form in ({"user_code": "AAAA-AAAA", "user": "ann"}, {"user_code": invitation.code, "user": "eve"}):
        with pytest.raises(HTTPError, match="400"):
            post(invitation.url, **form)
    post(invitation.url, user_code=invitation.code, user="ann")
    post(token_url, grant_type=grant, **waiting)
    with pytest.raises(HTTPError) as caught:
        post(token_url, grant_type=grant, **waiting)
    assert b"expired_token" in caught.value.read()


def test_bad_requests_get_short_answers(issuer: TestIssuer) -> None:
    for url, headers, form, status in (
        (f"{issuer.url}/token", {"host": "evil.example"}, {}, "421"),
        (f"{issuer.url}/token", {}, {"client_id": "another"}, "400"),
        (f"{issuer.url}/token", {}, {"client_id": CLIENT_ID, "grant_type": "password"}, "400"),
        (f"{issuer.url}/token", {}, {"client_id": CLIENT_ID, "grant_type": "refresh_token"}, "400"),
        (f"{issuer.url}/device_authorization", {}, {"client_id": "another"}, "400"),
        (f"{issuer.url}/device", {}, {"pad": "x" * 20_000}, "413"),
        (f"{issuer.url}/nothing", {}, {}, "404"),
    ):
        with pytest.raises(HTTPError, match=status):
            post(url, headers, **form)


def test_it_runs_on_loopback_for_a_stack_of_this_user_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = tmp_path / "stack"
    assert main(["--dir", str(stack), "--listen", "0.0.0.0:7105"]) == 78
    assert "loopback address only" in capsys.readouterr().err
    for listen in ("192.0.2.1:7105", "example.org:7105", "7105", "[::]:7105"):
        with pytest.raises(FedmeshError, match="loopback address only"):
            load(stack, listen)
    with pytest.raises(FedmeshError, match="is no stack"):
        load(stack, "127.0.0.1:7105")
    create_ca(stack / "ca", "consortium.local")
    (stack / "config").mkdir()
    stack.chmod(0o700)
    users = prepare(stack)
    assert load(stack, "127.0.0.1:7105").key.private_numbers() == load(stack, "127.0.0.1:7105").key.private_numbers()
    users.write_text("users: {'<b>': {}}\n")
    with pytest.raises(FedmeshError, match="a user's name must be"):
        load(stack, "127.0.0.1:7105")
    users.write_text("users: {eve: {roles: [root]}}\n")
    with pytest.raises(FedmeshError, match=r"users\.eve\.roles") as caught:
        load(stack, "127.0.0.1:7105")
    assert caught.value.code is Code.CONFIG_INVALID
    stack.chmod(0o755)
    with pytest.raises(FedmeshError, match="closed to others"):
        load(stack, "127.0.0.1:7105")
    assert os.stat(users).st_mode & 0o077 == 0
