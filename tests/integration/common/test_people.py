"""Operators who sign in: tokens of a real issuer over real HTTP, at the gate of a real server."""

import base64
import hashlib
import hmac
import json
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from pydantic import ValidationError

from services.cli import session
from services.common.config import PeopleConfig, ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.common.people.device import Client, Device
from services.common.people.keys import FETCH_GAP_S, IssuerKeys
from services.common.people.person import Person, person_name
from services.common.people.sign_in import SignIn
from services.embedded.ca import create_ca
from services.embedded.issuer import CLIENT_ID
from tests.support.signing_in import AUDIENCE, TestIssuer, running_issuer

ROLES = {"admins": "consortium-admin", "readers": "auditor"}


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Answers with the identity under which it was called."""

    async def ListPlans(self, request: Any, context: Any) -> Any:
        return registry_pb2.ListPlansResponse(next_page_token=str(caller()))

    async def RegisterHospital(self, request: Any, context: Any) -> Any:
        return registry_pb2.RegisterHospitalResponse()


class Setup:
    def __init__(self, issuer: TestIssuer, folder: Path) -> None:
        self.ca = create_ca(folder / "ca", "test.local")
        self.issuer = issuer
        self.operator = self.ca.issue_operator("shared-desk")
        people = people_config(issuer)
        config = ServerConfig(listen="127.0.0.1:0", tls=self.ca.issue_service("registry"), people=people)
        descriptor = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
        add = registry_pb2_grpc.add_RegistryServiceServicer_to_server
        self.server = MeshServer(config, [Endpoint(descriptor, add, Registry())])

    async def ask(self, token: str | None, method: str = "ListPlans", tls: TlsConfig | None = None) -> Any:
        target = f"127.0.0.1:{self.server.port}"
        async with MeshChannel(target, tls or self.operator, bearer=lambda: token) as channel:
            stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
            return await call(getattr(stub, method), getattr(registry_pb2, f"{method}Request")())


def people_config(issuer: TestIssuer, **changes: Any) -> PeopleConfig:
    return PeopleConfig.model_validate(
        {"issuer": issuer.url, "allow_loopback_issuer": True, "audience": AUDIENCE, "roles": ROLES, **changes}
    )


@pytest.fixture
def issuer() -> Iterator[TestIssuer]:
    with running_issuer() as made:
        yield made


@pytest.fixture
async def setup(issuer: TestIssuer, tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(issuer, tmp_path)
    await made.server.start()
    yield made
    await made.server.stop()


async def test_the_person_acts_and_not_the_certificate(setup: Setup) -> None:
    answer = await setup.ask(setup.issuer.token(sub="ann"))
    assert answer.next_page_token == "spiffe://test.local/operator/ann"
    await setup.ask(setup.issuer.token(), "RegisterHospital")


async def test_role_and_second_factor_are_required_and_services_need_no_token(setup: Setup) -> None:
    for token, method, code, text in (
        (None, "ListPlans", Code.UNAUTHENTICATED, "fedmesh login"),
        (setup.issuer.token(roles=["readers"]), "RegisterHospital", Code.PERMISSION_DENIED, "held: auditor"),
        (setup.issuer.token(roles=None), "ListPlans", Code.PERMISSION_DENIED, "held: none"),
        (setup.issuer.token(amr=["pwd"]), "RegisterHospital", Code.PERMISSION_DENIED, "second factor"),
    ):
        with pytest.raises(FedmeshError, match=text) as caught:
            await setup.ask(token, method)
        assert caught.value.code is code
    with pytest.raises(FedmeshError, match="service aggregator may not call"):
        await setup.ask(setup.issuer.token(), tls=setup.ca.issue_service("aggregator"))


def signed(issuer: TestIssuer, header: dict[str, Any], payload: str) -> str:
    """A token with a payload as it is written, a claim that comes twice included."""
    head = _text(json.dumps({"alg": "RS256", "kid": issuer.kid, **header}).encode())
    body = f"{head}.{_text(payload.encode())}"
    algorithm = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256)
    return f"{body}.{_text(algorithm.sign(body.encode(), issuer.key))}"


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _hmac_with_public_key(issuer: TestIssuer) -> str:
    pem = issuer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    head = _text(json.dumps({"alg": "HS256", "kid": issuer.kid}).encode())
    body = f"{head}.{_text(json.dumps(issuer.good()).encode())}"
    return f"{body}.{_text(hmac.new(pem, body.encode(), hashlib.sha256).digest())}"


def _other_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


BAD: dict[str, tuple[Callable[[TestIssuer], str], str]] = {
    "none": (lambda i: jwt.encode(i.good(), "", "none", {"kid": i.kid}), "algorithm is not accepted"),
    "hmac": (_hmac_with_public_key, "algorithm is not accepted"),
    "forged": (lambda i: jwt.encode(i.good(), _other_key(), "RS256", {"kid": i.kid}), "signature does not hold"),
    "no kid": (lambda i: jwt.encode(i.good(), i.key, "RS256"), "names no key"),
    "unknown kid": (lambda i: jwt.encode(i.good(), i.key, "RS256", {"kid": "k9"}), "key that the issuer"),
    "crit": (lambda i: signed(i, {"crit": ["b64"]}, json.dumps(i.good())), "crit"),
    "audience": (lambda i: i.token(aud="another"), "somebody else"),
    "issuer": (lambda i: i.token(iss="https://evil.example"), "another issuer"),
    "expired": (lambda i: i.token(exp=int(time.time()) - 60), "expired"),
    "not yet": (lambda i: i.token(nbf=int(time.time()) + 120), "not valid yet"),
    "no exp": (lambda i: i.token(exp=None), "no claim exp"),
    "no auth_time": (lambda i: i.token(auth_time=None), "no claim auth_time"),
    "old sign-in": (lambda i: i.token(auth_time=int(time.time()) - 13 * 3600), "too long ago"),
    "future sign-in": (lambda i: i.token(auth_time=int(time.time()) + 600), "auth_time"),
    "twice": (lambda i: signed(i, {}, json.dumps(i.good())[:-1] + ', "sub": "bob"}'), "names a claim twice"),
    "oversized": (lambda i: i.token(pad="x" * 9000), "larger than 8192"),
    "bound elsewhere": (lambda i: i.token(cnf={"x5t#S256": "A" * 43}), "another certificate"),
    "bound to a key": (lambda i: i.token(cnf={"jkt": "A" * 43}), "another certificate"),
    "garbage": (lambda i: "a.b.c", "not a signed"),
    "deep": (lambda i: f"{_text(b'[' * 5000)}.e30.x", "not a signed"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_token_that_does_not_hold_is_refused_with_the_reason(
    name: str, issuer: TestIssuer, tmp_path: Path
) -> None:
    make, text = BAD[name]
    pem = create_ca(tmp_path, "test.local").issue_operator("desk").certificate.read_bytes()
    with pytest.raises(FedmeshError, match=text) as caught:
        await SignIn(people_config(issuer)).person([f"Bearer {make(issuer)}"], pem)
    assert caught.value.code is Code.UNAUTHENTICATED


async def test_a_bound_token_holds_with_its_certificate_and_clocks_may_differ_a_little(setup: Setup) -> None:
    der = ssl.PEM_cert_to_DER_cert(setup.operator.certificate.read_text().split("-----END CERTIFICATE-----")[0] + END)
    bound = {"x5t#S256": _text(hashlib.sha256(der).digest())}
    skewed = int(time.time()) + 15
    await setup.ask(setup.issuer.token(cnf=bound, iat=skewed, auth_time=skewed))
    with pytest.raises(FedmeshError, match="another certificate"):
        await setup.ask(setup.issuer.token(cnf=bound), tls=setup.ca.issue_operator("second-desk"))


END = "-----END CERTIFICATE-----\n"


async def test_keys_are_kept_for_a_bounded_time_while_the_issuer_is_away(issuer: TestIssuer) -> None:
    now = [0.0]
    keys = IssuerKeys(people_config(issuer, keys_fresh_s=60, keys_stale_s=100), clock=lambda: now[0])
    await keys.get("k1")
    issuer.down = True
    now[0] = 159.0
    await keys.get("k1")
    now[0] = 161.0
    with pytest.raises(FedmeshError, match="cannot be fetched") as caught:
        await keys.get("k1")
    assert caught.value.code is Code.SERVICE_UNAVAILABLE
    issuer.down = False
    now[0] += FETCH_GAP_S
    await keys.get("k1")


async def test_a_new_key_is_fetched_at_once_but_unknown_ones_do_not_flood_the_issuer(issuer: TestIssuer) -> None:
    now = [0.0]
    keys = IssuerKeys(people_config(issuer), clock=lambda: now[0])
    await keys.get("k1")
    now[0] = FETCH_GAP_S
    issuer.kid = "k2"
    await keys.get("k2")
    asked = len(issuer.asked)
    for number in range(20):
        with pytest.raises(FedmeshError, match="does not have"):
            await keys.get(f"made-up-{number}")
    assert len(issuer.asked) == asked


def test_a_sign_in_that_is_over_ends_a_stream_and_names_are_never_shared() -> None:
    with pytest.raises(FedmeshError, match="fedmesh login"):
        Person("ann", frozenset(), True, time.time() - 1).require_current()
    subjects = ["ann", "Ann", "a|nn", "ann ", "x" * 64, person_name("Ann")]
    assert len({person_name(subject) for subject in subjects}) == len(subjects)


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": "http://idp.example"},
        {"issuer": "http://idp.example", "allow_loopback_issuer": True},
        {"issuer": "http://127.0.0.1:7105"},
        {"issuer": "https://localhost:7105"},
        {"jwks_url": "http://127.0.0.1:7105/keys"},
        {"algorithms": ["HS256"]},
        {"algorithms": ["none"]},
        {"roles": {"a": "root"}},
    ],
)
def test_an_unsafe_configuration_is_refused(change: dict[str, Any]) -> None:
    good = {"issuer": "https://idp.example", "audience": "a", "roles": ROLES}
    PeopleConfig.model_validate(good)
    with pytest.raises(ValidationError):
        PeopleConfig.model_validate({**good, **change})


def test_a_device_signs_in_and_its_session_renews_itself(
    issuer: TestIssuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "folder" / "session.json"))
    waits: list[float] = []
    client = Client(issuer.url, CLIENT_ID, "openid", "access")
    device = Device(client, waits.append)
    issuer.answers = [
        {"error": "authorization_pending"},
        {"error": "slow_down"},
        {"access_token": "first", "refresh_token": "r-1", "expires_in": 1},
        {"access_token": "second", "expires_in": 600},
    ]
    path = session.save(client, device.wait(device.invite()))
    assert waits == [1.0, 1.0, 6.0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [session.bearer(), session.bearer()] == ["second", "second"]
    assert issuer.forms[-1]["refresh_token"] == "r-1"
    path.chmod(0o644)
    with pytest.raises(FedmeshError, match="open to other users"):
        session.bearer()


def test_a_refusal_at_the_issuer_is_said_and_a_lost_session_sends_no_token(
    issuer: TestIssuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    assert session.bearer_if_any() is None
    client = Client(issuer.url, CLIENT_ID, "openid", "access")
    device = Device(client, lambda _seconds: None)
    issuer.answers = [{"error": "access_denied", "error_description": "no"}, {"error": "expired_token"}]
    with pytest.raises(FedmeshError, match="refused to sign you in: no"):
        device.wait(device.invite())
    with pytest.raises(FedmeshError, match="the code has expired"):
        device.wait(device.invite())
    issuer.answers = [{"access_token": "short", "expires_in": 0}]
    session.save(client, device.wait(device.invite()))
    with pytest.raises(FedmeshError, match="sign-in is over"):
        session.bearer()
    assert session.bearer_if_any() is None
